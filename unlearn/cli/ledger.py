"""What the commands on a ledger share: which one, who, and opening it."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from unlearn.ledger.ledger import Ledger

Url = Annotated[
    str | None,
    typer.Option(
        "--ledger", metavar="URL",
        help="sqlite:///FILE, a path, or postgresql://...; default: UNLEARN_LEDGER, else a file of the user"
    ),
]  # fmt: skip
By = Annotated[str | None, typer.Option("--by", metavar="WHO", help="who does this; default: the user of this process")]


def opened(url: str | None, create: bool = False) -> "Ledger":
    from unlearn.ledger.ledger import Ledger

    return Ledger(url, create)
