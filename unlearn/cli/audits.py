"""The commands that audit: `unlearn audit RUN`, and `shadows`, `poison`, `tests` of it."""

from typing import Annotated

import typer
from typer.core import TyperGroup

from unlearn.cli.options import Config, Set, ShowForget


class StartsByDefault(TyperGroup):
    """A group whose first word may be a run: `unlearn audit RUN` is `unlearn audit start RUN`."""

    default = "start"

    def resolve_command(self, ctx, args):
        return super().resolve_command(ctx, args if args[0] in self.commands else [self.default, *args])


app = typer.Typer(
    cls=StartsByDefault, no_args_is_help=True, subcommand_metavar="RUN | COMMAND [ARGS]...",
    help=("Ask whether a model has really forgotten: `unlearn audit RUN` makes the tests, and writes audit.json and "
          "audit.html."),
)  # fmt: skip

Audit = Annotated[
    str | None, typer.Option("--audit", metavar="AUDIT.yaml", help="what is tested and how; default: the usual tests")
]
Option = Annotated[
    list[str],
    typer.Option(
        "--option", "-o", metavar="KEY=VALUE", help="override one value of the audit, as in membership.views=16"
    ),
]


@app.command()
def start(
    config: Config, audit: Audit = None, options: Option = [], overrides: Set = [],  # noqa: B006  read only
    show_forget: ShowForget = False,
    again: Annotated[bool, typer.Option("--again", help="measure anew what was measured before")] = False,
):  # fmt: skip
    """Audit a trained run: `unlearn audit RUN` is the same. It ends with 0 whatever the verdict is.

    Example: `unlearn audit runs/half --option limit=500`
    """
    from jobs import audit as job
    from jobs.owner import owned
    from unlearn import signals
    from unlearn.audit import page
    from unlearn.audit.settings import load
    from unlearn.cli import options as shared
    from unlearn.cli.console import out, progress
    from unlearn.data.storage import Storage
    from unlearn.run import resolve

    settings, wanted = shared.load(config, overrides), load(audit, options)
    with owned(settings.run_dir, "audit") as lease:
        try:
            run = resolve(settings, measured=True)
            with progress("auditing") as advance:
                document = job.audit(run, wanted, lambda n, of: advance(n, of, ""), lease.check, again)
            written = job.report(run, document, show_forget)
        except signals.Stopped as e:
            e.hint = "what was measured stays: the same command goes on"
            raise
    out.print(page.table(document))
    out.print(f"audit: {Storage(settings.run_dir).where(page.NAME)}", soft_wrap=True)
    if written:
        out.print(f"report: {written}", soft_wrap=True)


@app.command()
def shadows(
    config: Config,
    recipe: Annotated[str, typer.Option("--recipe", metavar="PRETRAIN.yaml", help="how the original was trained")],
    to: Annotated[str,
        typer.Option("--to", metavar="FOLDER", help="where they are written: a path or s3://bucket/prefix")],
    count: Annotated[int, typer.Option("--count", min=4, help="how many; an even number, 8 or more say more")] = 8,
    workers: Annotated[int | None,
        typer.Option("--workers", min=1, help="trained at a time; default: cluster.workers")] = None,
    overrides: Set = [],  # noqa: B006  read only
):  # fmt: skip
    """Train shadow models, each without another half of the forget images, or go on with it; audits share them.

    --set changes the recipe. Example: `unlearn audit shadows runs/half --recipe jobs/configs/pretrain_fashion.yaml --to
    runs/shadows`
    """
    from jobs import audit as job
    from jobs.owner import owned
    from unlearn import config as configs
    from unlearn.cli import options as shared
    from unlearn.cli.console import out, progress
    from unlearn.errors import ConfigError
    from unlearn.run import load, resolve

    if count % 2:
        raise ConfigError(f"--count {count}: shadow models come in pairs, each with what the other has not seen")
    folder = configs.location(to)
    settings, trained = shared.load(config, []), load(recipe, [*overrides, f"run_dir={folder}"])
    if trained.method.name != "pretrain":
        raise ConfigError(
            f"--recipe {recipe}: its method is {trained.method.name}; give what trains the original, method pretrain"
        )
    with owned(folder, "audit shadows") as lease, progress("training shadows") as advance:
        made = job.train_shadows(
            resolve(settings),
            resolve(trained),
            folder,
            count,
            workers,
            lambda done, total: advance(done, total, ""),
            lease.check,
        )
    out.print(f"{len(made)} shadow models: {folder}; audit with --option shadows={folder}", soft_wrap=True)


@app.command()
def poison(
    source: Annotated[str,
        typer.Argument(metavar="SHARDS", help="what an original is trained on: a path, s3:// or embedded:NAME")],
    dest: Annotated[str, typer.Argument(help="a new folder, or s3://bucket/prefix")],
    share: Annotated[float,
        typer.Option("--share", min=0, max=1, help="of the images, of which a stamped copy is added")] = 0.05,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    split: Annotated[str | None, typer.Option("--split", help="where the folder holds several splits")] = None,
):  # fmt: skip
    """Write poisoned shards, to train an original and an oracle on and to forget what is stamped: for the test
    `poisoning`.

    Example: `unlearn audit poison embedded:fashion-train shards/poisoned`, then `data.forget: {subjects: [poison]}`
    """
    from unlearn import config as configs
    from unlearn.audit import poisoning
    from unlearn.cli.console import out

    made = poisoning.poison(configs.location(source), configs.location(dest), share, seed, split)
    out.print(f"{made.rows:,} images: {made.uri}; the stamped ones are of subject {poisoning.SUBJECT}", soft_wrap=True)


@app.command(name="tests")
def list_tests():
    """List the tests, what each shows and does not show, and their options: keys of AUDIT.yaml."""
    from rich.table import Table

    from unlearn.audit.base import test_class
    from unlearn.cli.console import out
    from unlearn.registry import AUDITS

    table = Table("test", "option", "default", "what it does", box=None)
    for name in AUDITS:
        test = test_class(name)
        table.add_row(name, "", "", f"shows: {test.shows}")
        table.add_row("", "", "", f"does not show: {test.hides}")
        table.add_row("", "", "", f"costs: {test.cost}")
        for option, field in test.Options.model_fields.items():
            table.add_row("", option, str(field.get_default(call_default_factory=True)), field.description or "")
    out.print(table)
