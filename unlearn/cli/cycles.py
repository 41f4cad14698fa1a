"""The commands that serve deletion requests: `unlearn cycle CYCLE.yaml`, and `show`, `report`, `metrics`, `notify` of
what it did."""

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from unlearn.cli.sweeps import StartsByDefault

if TYPE_CHECKING:
    from unlearn.cycles.history import Told
    from unlearn.cycles.records import Outcome, Selection

DUE = 3  # the exit code where no rung has passed the gate

app = typer.Typer(
    cls=StartsByDefault, no_args_is_help=True, subcommand_metavar="CYCLE.yaml | COMMAND [ARGS]...",
    help=("Serve the deletion requests that have accumulated: `unlearn cycle CYCLE.yaml` starts a cycle, or goes on "
          "with it."),
)  # fmt: skip

Source = Annotated[str, typer.Argument(metavar="CYCLE.yaml", help="a YAML file (path or s3://)")]
Changes = Annotated[
    list[str],
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="override one, as in promote=false, run.training.steps=100"),
]


@app.command()
def start(
    source: Source,
    overrides: Changes = [],  # noqa: B006  read only
    delete_rows: Annotated[
        str | None,
        typer.Option(
            "--delete-rows", metavar="FOLDER", help="write the shards anew there, without the rows that are served"
        ),
    ] = None,
):
    """Serve all open requests: select, unlearn from the base, evaluate, ask the gate, release; `unlearn cycle
    CYCLE.yaml` is the same.

    Exits with 0 where it has released or nothing is open, with 3 where retraining is due, with 2 on a mistake.

    Example: `unlearn cycle cycle.yaml --set promote=false`
    """
    from jobs import cycle as job
    from unlearn import signals
    from unlearn.cli.console import out, warn
    from unlearn.cli.options import required, warned
    from unlearn.cycles import cycle_file, gate_check, unserved

    required()
    changes = [*overrides, *([f"delete_rows={json.dumps(delete_rows)}"] if delete_rows else [])]
    cycle = cycle_file.load(source, changes)
    warned(cycle.settings(0))
    for doubt in gate_check.doubts(cycle):
        warn(doubt)
    with job.owned(cycle, "cycle") as check:
        try:
            ended = job.run(cycle, shown, check)
        except signals.Stopped as e:
            given = [word for item in overrides for word in ("--set", item)]
            given += ["--delete-rows", delete_rows] if delete_rows else []
            e.hint = f"nothing that was done is done again: {shlex.join(['unlearn', 'cycle', source, *given])}"
            raise
    for line in told(ended.selection, ended.outcome):
        out.print(line, soft_wrap=True)
    for line in unserved.told(cycle):
        warn(line)
    if ended.outcome is not None and ended.outcome.due:
        raise typer.Exit(DUE)


@app.command()
def show(
    source: Source,
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="one cycle alone, with its verdicts")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
):
    """Show the cycles that there were, or all about one of them.

    Example: `unlearn cycle show cycle.yaml`
    """
    from rich.table import Table

    from unlearn.cli.console import out, say
    from unlearn.cycles import cycle_file, history
    from unlearn.cycles.records import Records

    records = Records(cycle_file.load(source).cycle_dir)
    found = history.of(records) if id is None else [history.one(records, records.selection(id))]
    if as_json:
        typer.echo(json.dumps([each.document() for each in found], indent=1))
        return
    if id is not None:
        _show(found[0])
        return
    table = Table("cycle", "begun", "new", "old", "rungs", "ended", box=None)
    for each in found:
        s = each.selection
        table.add_row(s.id, s.at[:16], str(len(s.new)), str(len(s.old)), str(len(each.tried)), each.ended)
    if found:
        out.print(table)
    say(f"{len(found)} cycle{'s' * (len(found) != 1)}")


@app.command()
def report(
    source: Source,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="default: history.html in the cycles' folder")
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", metavar="PUB", help="verify every release with this public key")
    ] = None,
):
    """Write the page that shows the history: requests, cycles, figures, verdicts, releases.

    Example: `unlearn cycle report cycle.yaml --key releases.pub`
    """
    from unlearn import certificate
    from unlearn.cli.console import out
    from unlearn.cycles import cycle_file, page
    from unlearn.errors import CycleError

    public = certificate.public_key(key) if key else None
    uri, wrong = page.write(cycle_file.load(source), output, public)
    out.print(f"report: {uri}", soft_wrap=True)
    if wrong:
        raise CycleError(f"{', '.join(wrong)} cannot be verified with {key}: the page says why")


@app.command()
def metrics(source: Source):
    """Print requests, the last cycle and the gate's verdicts, as Prometheus reads them.

    Example: `unlearn cycle metrics cycle.yaml > /var/lib/node_exporter/unlearn.prom`
    """
    from unlearn.cli.console import out
    from unlearn.cycles import cycle_file, prometheus
    from unlearn.ledger import metrics as requests
    from unlearn.ledger.ledger import Ledger

    cycle = cycle_file.load(source)
    with Ledger(cycle.ledger) as ledger:
        out.print(requests.text(ledger), soft_wrap=True)
    out.print(prometheus.text(cycle), soft_wrap=True)


@app.command()
def notify(
    source: Source,
    url: Annotated[str, typer.Argument(metavar="URL", help="http(s), where the webhook is to go")],
    secret: Annotated[str, typer.Option("--secret-file", metavar="FILE", help="the key it is signed with, base64")],
):
    """Send requests, the last cycle and the gate's verdicts as a signed webhook; tried again for 15 seconds.

    Example: `unlearn cycle notify cycle.yaml https://desk.example/hook --secret-file webhook.secret`
    """
    from unlearn.cli.console import out
    from unlearn.cycles import cycle_file, notice
    from unlearn.ledger import webhook
    from unlearn.ledger.ledger import Ledger

    key, cycle = webhook.secret(secret), cycle_file.load(source)
    with Ledger(cycle.ledger) as ledger:
        attempts = webhook.send(url, key, notice.event(cycle, ledger))
    out.print(f"sent at attempt {attempts}")


def told(selection: "Selection", outcome: "Outcome | None") -> Iterator[str]:
    """What a cycle came to, line by line."""
    if selection.unmatched:
        yield f"no image meets request(s) {_numbers(selection.unmatched)}: they stay open, see `unlearn request reject`"
    if partly := [asked for asked in selection.new if asked.missing]:
        named = ", ".join(f"{asked.number} ({asked.missing} of its values)" for asked in partly)
        yield f"met in part only: request(s) {named}"
    if outcome is None:
        yield (
            "nothing to serve: no open request meets an image"
            if selection.unmatched
            else "nothing to serve: no request is open"
        )
    elif outcome.due:
        yield (
            f"retraining is due: no rung of cycle {selection.id} passed the gate; request(s) "
            f"{_numbers(outcome.numbers)} stay open. See `unlearn cycle show`; another gate, ladder or base is tried "
            "by the same command"
        )
    else:
        current = ", now current" if outcome.promoted else ", not made current"
        yield f"{outcome.release}{current}: cycle {selection.id} has served request(s) {_numbers(outcome.numbers)}"
        yield f"release: {outcome.folder}"
        if rows := outcome.rows:
            yield (
                f"shards without {rows.removed} rows: {rows.uri}; to be deleted: {len(rows.delete)} objects, see "
                "`unlearn cycle show`"
            )


def _show(one: "Told") -> None:
    from unlearn.cli.console import out

    s = one.selection
    out.print(f"cycle {s.id}, begun {s.at}: {one.ended}", soft_wrap=True)
    out.print(f"serves   {_numbers(s.numbers)}")
    out.print(f"again    {_numbers([asked.number for asked in s.old]) or 'none'}")
    if s.unseen:
        numbers = _numbers([asked.number for asked in s.unseen])
        out.print(f"unseen   {numbers}: none of their images is in the data, and the base never saw them")
    out.print(f"base     {s.base}\ndata     {s.data}", soft_wrap=True)
    for judgement in one.tried:
        verdict = "passed" if judgement.passed else "refused"
        out.print(f"rung {judgement.rung}  {verdict}, beside {judgement.parent or 'no release'}, {judgement.at}")
        for check in judgement.verdict.checks if judgement.verdict else ():
            out.print(f"  {check}", soft_wrap=True)
    for end in one.ends:
        for line in told(s.model_copy(update={"unmatched": []}), end):
            out.print(line, soft_wrap=True)
        for name in end.rows.delete if end.rows else ():
            out.print(f"  {name}", soft_wrap=True)


def _numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


@contextlib.contextmanager
def shown(step: str, rung: int) -> Iterator[Callable[..., None]]:
    """A bar while a rung is trained, measured or audited."""
    from unlearn.cli.console import progress, training

    what = f", rung {rung}" if rung else ""
    if step == "train":
        with progress(f"training{what}") as advance:
            yield lambda row: advance(*training(row))
    elif step in ("evaluate", "audit"):
        with progress(f"{'evaluating' if step == 'evaluate' else 'auditing'}{what}") as advance:
            yield lambda done, total: advance(done, total, "")
    else:
        yield lambda *about: None
