"""The commands on the ledger of deletion requests: `unlearn request add`, `list`, `show`, `verify` and others."""

from typing import Annotated

import typer

from unlearn.cli import ledger_checkpoints
from unlearn.cli.ledger import By, Url, opened
from unlearn.errors import LedgerError

app = typer.Typer(
    no_args_is_help=True, help="Record deletion requests, follow them, and prove that the record is whole."
)

Ids = Annotated[list[int], typer.Argument(metavar="ID...", help="numbers of requests")]
Id = Annotated[int, typer.Argument(metavar="ID", help="number of a request")]
Keys = Annotated[bool, typer.Option("--show-keys", help="show what the requests name: subjects, ids, reasons")]
Within = Annotated[str | None, typer.Option("--within", metavar="SPAN", help="due after 30d, 4w, 1m; default: 1m")]


@app.command()
def add(
    subject: Annotated[str | None, typer.Option(help="value of the column `subject`")] = None,
    ids: Annotated[str | None, typer.Option(metavar="FILE", help="a file with an image id a line")] = None,
    class_: Annotated[str | None, typer.Option("--class", help="name of a class, or its label")] = None,
    due: Annotated[str | None, typer.Option(metavar="DATE", help="as in 2026-12-31")] = None,
    within: Within = None,
    reason: Annotated[str | None, typer.Option(help="erased together with what the request names")] = None,
    by: By = None,
    ledger: Url = None,
):
    """Record a request to forget a subject, images by id, or a class.

    Example: `unlearn request add --subject alice --within 30d --reason "withdrew consent"`
    """
    from unlearn.cli.console import out, warn
    from unlearn.ledger import dates, importing
    from unlearn.ledger.request import wanted

    classes = [importing.label(class_)] if class_ is not None else None
    named = {"subjects": [subject.strip()] if subject is not None else None, "ids": _lines(ids), "classes": classes}
    request = {"forget": wanted(named), "due": dates.due(due, within), "reason": reason}
    with opened(ledger, create=True) as book:
        (number,) = book.add([request], by)
    out.print(f"request {number}: received, due {request['due']}")
    if listed := request["forget"].get("ids"):
        out.print(f"{len(listed)} id{'s' * (len(listed) != 1)}, the first is {listed[0]}", soft_wrap=True)
    if dates.parse(request["due"], "due") < dates.today():
        warn(f"request {number} is overdue from the start: {request['due']} has passed")


@app.command("list")
def list_(
    state: Annotated[str | None, typer.Option(help="only those in this state")] = None,
    everything: Annotated[bool, typer.Option("--all", help="closed ones too")] = False,
    overdue: Annotated[bool, typer.Option("--overdue", help="only those that should be closed by now")] = False,
    limit: Annotated[int, typer.Option(min=0, help="show at most so many; 0: all")] = 50,
    show_keys: Keys = False,
    ledger: Url = None,
):
    """Show requests, those that are due first; open ones unless told otherwise.

    Example: `unlearn request list --overdue`
    """
    from rich.table import Table

    from unlearn.cli.console import out, say
    from unlearn.ledger import states

    if state is not None and state not in states.STATES:
        raise LedgerError(f"--state {state}: the states are {', '.join(states.STATES)}")
    with opened(ledger) as book:
        requests = book.requests([state] if state else None if everything else states.OPEN)
    requests = sorted((r for r in requests if r.is_overdue or not overdue), key=lambda r: (not r.is_open, r.due, r.id))
    late = sum(request.is_overdue for request in requests)
    table = Table("request", "state", "received", "due", "names", box=None)
    for request in requests[: limit or None]:
        due = f"{request.due} OVERDUE" if request.is_overdue else request.due
        table.add_row(str(request.id), request.state, request.received[:10], due, request.about(show_keys))
    if requests:
        out.print(table)
    hidden = f"; the first {limit} are shown, see --limit" if limit and len(requests) > limit else ""
    say(f"{len(requests)} request{'s' * (len(requests) != 1)}, {late} overdue{hidden}")


@app.command()
def show(request_id: Id, show_keys: Keys = False, ledger: Url = None):
    """Tell a request's state and its history: when, who, by what evidence.

    Example: `unlearn request show 7 --show-keys`
    """
    from unlearn.cli.console import out

    with opened(ledger) as book:
        request, history = book.request(request_id), book.history(request_id)
    late = ", overdue" if request.is_overdue else ""
    out.print(f"request {request.id}: {request.state}{late}, due {request.due}")
    out.print(f"names       {request.about(show_keys)}", soft_wrap=True)
    out.print(f"commitment  {request.commitment}", soft_wrap=True)
    for step in history:
        private = step["private"]
        facts = [f"by {private['by']}"] if "by" in private else []
        facts += [f"reason: {private['reason'] if show_keys else 'see --show-keys'}"] if "reason" in private else []
        facts += [f"{name}={value}" for name, value in step.get("evidence", {}).items()]
        out.print(f"{step['at']}  entry {step['position']}  {step['event']}  {', '.join(facts)}", soft_wrap=True)


@app.command()
def withdraw(
    ids: Ids, reason: Annotated[str | None, typer.Option(help="why")] = None, by: By = None, ledger: Url = None
):
    """Close requests that the person has withdrawn.

    Example: `unlearn request withdraw 7`
    """
    _close(ids, "withdrawn", reason, by, ledger)


@app.command()
def reject(
    ids: Ids,
    reason: Annotated[str, typer.Option(help="why; it is in the letter to the person")],
    by: By = None,
    ledger: Url = None,
):
    """Close requests that will not be served.

    Example: `unlearn request reject 7 --reason "no image of this person is in the data"`
    """
    if not reason.strip():
        raise LedgerError("--reason: say why; it is in the letter to the person")
    _close(ids, "rejected", reason, by, ledger)


@app.command("import")
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="CSV (.csv) or JSON lines (.jsonl), here or on S3")],
    within: Within = None,
    by: By = None,
    ledger: Url = None,
):
    """Record all requests of a file, or none where one is wrong. Columns: subject, ids (with ; between), class, due,
    reason, by.

    Example: `unlearn request import requests.csv --by desk`
    """
    from unlearn.cli.console import out
    from unlearn.ledger import importing

    requests = importing.read(file, within)
    with opened(ledger, create=True) as book:
        numbers = book.add(requests, by)
    out.print(f"{len(numbers)} requests received: {numbers[0]} to {numbers[-1]}")


@app.command()
def export(
    output: Annotated[str | None, typer.Option(metavar="FILE", help="default: standard output")] = None,
    show_keys: Keys = False,
    ledger: Url = None,
):
    """Write every entry as a JSON line: its document, its hash, and with --show-keys what its commitments stand for.

    Example: `unlearn request export --output ledger.jsonl`
    """
    import json
    import os
    import sys

    from unlearn.cli.console import say
    from unlearn.data.storage import Storage, told

    with opened(ledger) as book:
        lines = (json.dumps(line) + "\n" for line in book.export(show_keys))
        if output is None:
            sys.stdout.writelines(lines)
            return
        with Storage(output).writing("") as path, told(output):
            with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as f:
                f.writelines(lines)
    say(f"written: {output}")


for command in (ledger_checkpoints.verify, ledger_checkpoints.checkpoint, ledger_checkpoints.reseal):
    app.command()(command)


@app.command()
def erase(
    ids: Ids,
    retention: Annotated[str, typer.Option(metavar="SPAN", help="how long closed requests are kept: 90d, 3y")] = "3y",
    images_gone: Annotated[
        bool, typer.Option("--images-gone", help="their images have left the training data; recorded")
    ] = False,
    by: By = None,
    ledger: Url = None,
):
    """Erase what closed requests name, and why, after the retention time; the record of them stays verifiable. A
    released one wants --images-gone.

    Example: `unlearn request erase 7 --retention 3y --images-gone`
    """
    from unlearn.cli.console import out

    with opened(ledger) as book:
        erased = book.erase(ids, retention, by, images_gone)
    out.print(f"erased: {', '.join(map(str, erased)) or 'none, they were already'}", soft_wrap=True)


@app.command()
def letter(request_id: Id, show_keys: Keys = False, ledger: Url = None):
    """Write to the person who asked, as plain text: what was asked, what was done, what is not claimed.

    Example: `unlearn request letter 7 > letter.txt`
    """
    from unlearn.cli.console import out
    from unlearn.ledger.letter import write

    with opened(ledger) as book:
        out.print(write(book, request_id, show_keys), soft_wrap=True)


@app.command()
def metrics(ledger: Url = None):
    """Print requests by state, pending and overdue, as Prometheus reads them.

    Example: `unlearn request metrics > /var/lib/node_exporter/unlearn.prom`
    """
    from unlearn.cli.console import out
    from unlearn.ledger.metrics import text

    with opened(ledger) as book:
        out.print(text(book), soft_wrap=True)


@app.command()
def notify(
    url: Annotated[str, typer.Argument(metavar="URL", help="http(s), where the webhook is to go")],
    secret: Annotated[str, typer.Option("--secret-file", metavar="FILE", help="the key it is signed with, base64")],
    ledger: Url = None,
):
    """Send requests by state, pending and overdue, as a signed webhook; tried again for 15 seconds.

    Example: `unlearn request notify https://desk.example/hook --secret-file webhook.secret`
    """
    from unlearn.cli.console import out
    from unlearn.ledger import webhook

    key = webhook.secret(secret)
    with opened(ledger) as book:
        attempts = webhook.send(url, key, webhook.event(book))
    out.print(f"sent at attempt {attempts}")


def _close(ids: list[int], state: str, reason: str | None, by: str | None, ledger: str | None) -> None:
    from unlearn.cli.console import out

    with opened(ledger) as book:
        moved = book.advance(ids, state, by=by, reason=reason or "")
    out.print(f"{state}: {', '.join(map(str, moved)) or 'none, they were already'}", soft_wrap=True)


def _lines(path: str | None) -> list[str] | None:
    """The ids in a file, one a line."""
    from unlearn.cli.console import warn

    if path is None:
        return None
    try:
        with open(path, encoding="utf-8-sig") as f:
            lines = [(number, line.strip()) for number, line in enumerate(f, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", None) or "not UTF-8: save it as UTF-8 text"
        raise LedgerError(f"--ids {path}: {why}") from None
    if not lines:
        raise LedgerError(f"--ids {path}: holds no id")
    if wrong := [number for number, id in lines if "\0" in id]:
        raise LedgerError(f"--ids {path} line {wrong[0]}: holds a NUL character: save it as UTF-8 text, an id a line")
    if odd := [number for number, id in lines if set(id) & set(',"')]:
        warn(f"--ids {path} line {odd[0]}: holds a comma or a quote, and is taken as one id: there is an id a line")
    return [id for _, id in lines]
