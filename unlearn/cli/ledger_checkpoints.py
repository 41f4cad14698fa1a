"""The commands that prove a ledger whole: `unlearn request verify`, `checkpoint`, `reseal`."""

from typing import Annotated

import typer

from unlearn.cli.ledger import By, Url, opened
from unlearn.errors import LedgerError

Place = Annotated[str, typer.Argument(metavar="URI", help="folder of the checkpoints: a path, file:// or s3://")]
Private = Annotated[str, typer.Option("--key", metavar="FILE", help="private Ed25519 key, PEM")]


def verify(
    checkpoints: Annotated[
        str | None, typer.Option(metavar="URI", help="folder of the checkpoints: a path, file:// or s3://")
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="FILE", help="public Ed25519 key of the checkpoints, PEM")] = None,
    ledger: Url = None,
):
    """Walk the whole ledger and hold it against its checkpoints; names every entry that is not what it was, and exits
    with 2.

    Example: `unlearn request verify --checkpoints s3://bucket/ledger --key ledger.pub`
    """
    from unlearn import certificate
    from unlearn.cli.console import out, warn
    from unlearn.ledger import verification

    if (checkpoints is None) != (key is None):
        raise LedgerError("--checkpoints and --key belong together: a checkpoint is worth what its signature is")
    with opened(ledger) as book:
        report = verification.verify(book, checkpoints, certificate.public_key(key) if key else None)
        report.check(book.name)
    if checkpoints and not (report.holding or report.resealed):
        raise LedgerError(
            f"{checkpoints}: no checkpoint is there, so nothing was proved; is it the right place? `unlearn request "
            "checkpoint` writes the first one"
        )
    size = report.walk.tree.size
    out.print(f"{size} entries, every one is good; root {report.walk.tree.root()}", soft_wrap=True)
    for checkpoint, reseal in reversed(report.resealed):
        out.print(
            (
                f"{checkpoint} is explained by the re-seal of {reseal.at}: a backup of {reseal.common} entries was "
                "restored"
            ),
            soft_wrap=True,
        )
    if report.holding:
        since = size - report.holding[-1].size
        out.print(f"{len(report.holding)} checkpoints hold; {since} entries are newer than the last", soft_wrap=True)
    else:
        warn("not held against any checkpoint: a history that was rewritten from some entry on, or cut, is not found")


def checkpoint(to: Place, key: Private, ledger: Url = None):
    """Verify the ledger and sign what it holds, away from its database.

    Example: `unlearn request checkpoint s3://bucket/ledger --key ledger.key`
    """
    from unlearn import certificate
    from unlearn.cli.console import out
    from unlearn.ledger import verification

    signer = certificate.private_key(key)
    with opened(ledger) as book:
        written, new = verification.checkpoint(book, to, signer)
    note = "" if new else ", which was there already"
    out.print(f"{written.name}: {written.size} entries, root {written.root}{note}", soft_wrap=True)


def reseal(
    at: Place,
    key: Private,
    reason: Annotated[str, typer.Option(help="which backup was restored, and why")],
    restored: Annotated[int | None, typer.Option(help="entries of the backup, where others were written since")] = None,
    by: By = None,
    ledger: Url = None,
):
    """Record that the ledger was restored from a backup, and sign what it holds now. Refused where it was changed
    otherwise.

    Example: `unlearn request reseal s3://bucket/ledger --key ledger.key --reason "disk lost, backup of Monday"`
    """
    from unlearn import certificate
    from unlearn.cli.console import out
    from unlearn.ledger import verification

    signer = certificate.private_key(key)
    with opened(ledger) as book:
        written = verification.reseal(book, at, signer, reason, by, restored)
    out.print(f"re-sealed; {written.name}: {written.size} entries, root {written.root}", soft_wrap=True)
