"""The commands on releases: `unlearn release keygen`, `publish`, `verify`, `list`, `show`, `diff`, `promote`, `push`,
`rollback`, `withdraw`."""

import json
import re
from typing import Annotated

import typer

from unlearn.cli import release_shown as shown

app = typer.Typer(no_args_is_help=True, help="Publish, certify, verify, promote and withdraw releases of a model.")

Where = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="UNLEARN_RELEASES",
        metavar="URI",
        help="where the releases of this model lie: a folder or s3://",
    ),
]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="as in v3")]
Json = Annotated[bool, typer.Option("--json", help="for programs")]
Reason = Annotated[str, typer.Option(help="recorded with the change")]
By = Annotated[str | None, typer.Option(help="who does it; default: the user's name")]
Force = Annotated[
    bool, typer.Option("--force", help="though the model remembers what others have forgotten; wants --reason")
]
Public = Annotated[str, typer.Option("--key", metavar="PUB", help="the publisher's public key, a .pub file")]


@app.command()
def keygen(name: Annotated[str, typer.Argument(help="writes NAME.key, to sign with and to keep, and NAME.pub")]):
    """Make a pair of Ed25519 keys.

    Example: `unlearn release keygen releases`
    """
    from unlearn import certificate
    from unlearn.cli.console import out

    path, key = certificate.generate(name)
    out.print(f"{name}.key signs: keep it secret. {path} verifies: hand it out. Key id {key.keyid}", soft_wrap=True)


@app.command()
def publish(
    run: Annotated[str, typer.Argument(help="the folder of a run that was trained and evaluated")],
    store: Where,
    key: Annotated[
        str, typer.Option("--key", envvar="UNLEARN_RELEASE_KEY", metavar="FILE", help="the private key, a .key file")
    ],
    gate: Annotated[str | None, typer.Option(metavar="YAML", help="thresholds over the figures; default: none")] = None,
    request: Annotated[
        list[str], typer.Option(metavar="COMMITMENT", help="to a deletion request that it serves; may be repeated")
    ] = [],  # noqa: B006  read only
    requests: Annotated[
        str | None, typer.Option(metavar="FILE", help="a text file of such commitments, one a line")
    ] = None,
    parent: Annotated[
        str | None, typer.Option(metavar="VERSION", help="the release that it follows; default: the current one")
    ] = None,
    withdraws: Annotated[
        list[str], typer.Option(metavar="VERSION", help="withdrawn once this one is current; may be repeated")
    ] = [],  # noqa: B006  read only
    model_signing: Annotated[
        str | None,
        typer.Option(
            "--model-signing", metavar="FILE", help="a private elliptic-curve key: sign the model for other tools"
        ),
    ] = None,
    as_json: Json = False,
):
    """Make a run a release: judge it, copy it to a new folder, certify it. Exits with 2 where the gate refuses it.

    Example: `unlearn release publish runs/7 --store s3://bucket/releases --key releases.key --gate gate.yaml --requests
    served.txt`
    """
    from unlearn import certificate
    from unlearn.cli.console import out
    from unlearn.data.storage import Storage
    from unlearn.errors import ReleaseError
    from unlearn.releases import gate as gates
    from unlearn.releases import publish as publisher
    from unlearn.releases.release import SIGNATURE
    from unlearn.releases.store import Store

    signer, rules = certificate.private_key(key), gates.load(gate) if gate else None
    try:
        listed = Storage(requests).read().decode("utf-8-sig").split() if requests else []
    except UnicodeDecodeError:
        raise ReleaseError(f"--requests {requests}: not UTF-8: save it as UTF-8 text") from None
    if requests and not listed:
        raise ReleaseError(f"--requests {requests}: holds no commitment; leave it out where no request is served")
    served = [*request, *listed]
    if wrong := [text for text in served if not re.fullmatch("[0-9a-f]{64}", text)]:
        raise ReleaseError(
            f"{wrong[0][:70]!r} is no commitment: that is 64 hex digits, see `unlearn request show`, line `commitment`"
        )
    outcome = publisher.publish(run, Store(store), signer, served, rules, parent, withdraws, model_key=model_signing)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "version": outcome.release and outcome.release.version,
                    "folder": outcome.folder,
                    "new": outcome.new,
                    "gate": outcome.verdict and outcome.verdict.model_dump(mode="json"),
                }
            )
        )
    if outcome.release is None:
        assert outcome.verdict is not None, "only a gate refuses"
        reasons = "\n  ".join(map(str, outcome.verdict.reasons))
        raise ReleaseError(f"not released; the candidate is kept in {outcome.folder}. The gate says:\n  {reasons}")
    if not as_json:
        shown.show_verdict(outcome.verdict)
        what = f"{outcome.release.version}: " + ("published" if outcome.new else "this model was published before")
        out.print(f"{what}, in {outcome.folder}", soft_wrap=True)
        if model_signing and SIGNATURE not in outcome.release.files:
            out.print(f"it has no {SIGNATURE}, and a release is never changed", soft_wrap=True)


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="the folder of one release, wherever it was copied to")],
    key: Public,
    as_json: Json = False,
):
    """Check a release by its folder and the public key alone: names every file that was changed, added or removed, and
    exits with 2.

    Example: `unlearn release verify v3-5f2a9c01 --key releases.pub`
    """
    from unlearn import certificate
    from unlearn.cli.console import out
    from unlearn.errors import ReleaseError
    from unlearn.releases import verification

    public = certificate.public_key(key)
    release, found = verification.inspect(folder, public)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "good": not found,
                    "changed": found.changed,
                    "added": found.added,
                    "removed": found.removed,
                    "release": release.model_dump(mode="json"),
                }
            )
        )
    if found:
        raise ReleaseError(f"{folder} is not {release.version} as it was published. {found}")
    if not as_json:
        out.print(
            f"{folder}: good; {len(release.files) + 1} files as {public.keyid[:16]} has signed them", soft_wrap=True
        )
        shown.show_claims(release)


@app.command("list")
def list_releases(
    store: Where,
    rejected: Annotated[bool, typer.Option("--rejected", help="the candidates that the gate refused, and why")] = False,
    as_json: Json = False,
):
    """List the releases of a store, and which one is current."""
    from unlearn.releases import pointer, rejection
    from unlearn.releases.store import Store

    opened = Store(store)
    opened.check()
    if rejected:
        return shown.list_rejected(rejection.kept(opened), as_json)
    state, releases = pointer.read(opened), opened.releases()
    if as_json:
        typer.echo(json.dumps([r.model_dump(mode="json") | {"state": shown.state_of(r, state)} for r in releases]))
        return
    from rich.table import Table

    from unlearn.cli.console import out

    table = Table("version", "published", "state", "requests", "parent", "gate", "folder", box=None)
    for r in releases:
        gate = "none" if r.gate is None else "passed"
        parent = (r.parent and r.parent.version) or "-"
        table.add_row(
            r.version, r.published[:16], shown.state_of(r, state), str(len(r.requests)), parent, gate, r.folder
        )
    out.print(table if releases else f"{opened.storage.uri}: no release yet")


@app.command()
def show(version: Version, store: Where, as_json: Json = False):
    """Tell of one release: what it is, what it claims and what not, what came from it.

    Example: `unlearn release show v3 --store s3://bucket/releases`
    """
    from rich.table import Table

    from unlearn.cli.console import out
    from unlearn.releases import lineage, pointer
    from unlearn.releases.release import described
    from unlearn.releases.store import Store

    opened = Store(store)
    release, state = opened.release(version), pointer.read(opened)
    line = lineage.descendants(release, opened.releases())
    if as_json:
        descendants = [vars(each) for each in line]
        moves = [move.model_dump() for move in state.history if version in (move.before, move.after)]
        withdrawn = state.withdrawn[version].model_dump() if version in state.withdrawn else None
        about = {
            "state": shown.state_of(release, state),
            "withdrawn": withdrawn,
            "descendants": descendants,
            "history": moves,
        }
        typer.echo(json.dumps(release.model_dump(mode="json") | about))
        return
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in described(release).items():
        table.add_row(name, str(value if value not in (None, "") else "-"))
    table.add_row("state", shown.state_of(release, state))
    if withdrawal := state.withdrawn.get(version):
        table.add_row("withdrawn", f"{withdrawal.at} by {withdrawal.by}: {withdrawal.reason}")
    table.add_row("came from it", ", ".join(f"{each.version} ({each.how} {each.of})" for each in line) or "-")
    table.add_row("folder", opened.folder(release).uri)
    out.print(table)
    shown.show_verdict(release.gate)
    shown.show_claims(release)


@app.command()
def diff(
    old: Annotated[str, typer.Argument(help="a version, as in v3")],
    new: Annotated[str, typer.Argument(help="another one")],
    store: Where,
    as_json: Json = False,
):
    """Tell what differs between two releases: configuration, figures, requests, data.

    Example: `unlearn release diff v2 v3 --store s3://bucket/releases`
    """
    from unlearn.cli.console import out
    from unlearn.releases import difference
    from unlearn.releases.store import Store

    opened = Store(store)
    found = difference.of(opened, opened.release(old), opened.release(new))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for part in ("release", "config", "measured otherwise", "figures"):
        for name, (before, after) in found[part].items():
            numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (before, after))
            change = f"  ({after - before:+.4g})" if numbers else ""
            out.print(f"{name}: {shown.short(before)} -> {shown.short(after)}{change}", soft_wrap=True)
    for name, requests in found["requests"].items():
        if requests:
            out.print(f"requests {name}: {len(requests)}")
    if not any(found[part] for part in found if part != "requests") and not any(found["requests"].values()):
        out.print(f"{old} and {new} do not differ")


@app.command()
def promote(
    version: Version,
    store: Where,
    key: Annotated[
        str | None, typer.Option("--key", metavar="PUB", help="verify the release with this public key first")
    ] = None,
    reason: Reason = "",
    force: Force = False,
    by: By = None,
):
    """Make a release the current one. Refused where it remembers what another release has forgotten.

    Example: `unlearn release promote v3 --store s3://bucket/releases --key releases.pub`
    """
    from unlearn.releases import pointer
    from unlearn.releases.store import Store

    opened = Store(store)
    if key:
        shown.verified(opened, version, key)
    shown.told(opened, pointer.promote(opened, version, reason, force, by))


@app.command()
def push(
    version: Version,
    store: Where,
    to: Annotated[
        str, typer.Option("--to", metavar="URL", help="of Kubeflow's Model Registry; mlflow:URI is MLflow's")
    ],
    name: Annotated[str, typer.Option("--name", metavar="MODEL", help="of the registered model there")],
    key: Annotated[
        str | None, typer.Option("--key", metavar="PUB", help="verify the release with this public key first")
    ] = None,
    token_file: Annotated[
        str,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="default: UNLEARN_REGISTRY_TOKEN_FILE; or the token in UNLEARN_REGISTRY_TOKEN",
        ),
    ] = "",
    authority: Annotated[
        str, typer.Option("--ca", metavar="FILE", help="certificates to trust, PEM; default: those of the web")
    ] = "",
):
    """Register a release in Kubeflow's Model Registry, or in MLflow's: where it is and how to check it. The same again
    changes nothing.

    Example: `unlearn release push v3 --store s3://bucket/releases --to https://registry.example.com --name faces`
    """
    from unlearn import tokens
    from unlearn.cli.console import out
    from unlearn.errors import ConfigError
    from unlearn.releases import mlflow_registry, registry
    from unlearn.releases.store import Store

    if to.startswith(mlflow_registry.SCHEME):
        if token_file or authority:
            raise ConfigError(
                "--token-file and --ca are for Kubeflow's registry: MLflow reads MLFLOW_TRACKING_TOKEN and "
                "MLFLOW_TRACKING_SERVER_CERT_PATH"
            )
        server = mlflow_registry.registry(to)
    else:
        server = registry.Registry(to, tokens.source(registry.TOKEN, token_file), authority)

    opened = Store(store)
    if key:
        shown.verified(opened, version, key)
    id, new = server.push(opened, version, name)
    out.print(f"{version}: {'registered' if new else 'is registered already'} as {name}, id {id}", soft_wrap=True)


@app.command()
def rollback(
    store: Where,
    version: Annotated[str | None, typer.Argument(help="as in v2; default: the one that was current before")] = None,
    reason: Reason = "",
    force: Force = False,
    by: By = None,
):
    """Go back to a release that was current before. Refused where it remembers what a later one has forgotten.

    Example: `unlearn release rollback --store s3://bucket/releases --reason "artefacts in skies"`
    """
    from unlearn.releases import pointer
    from unlearn.releases.store import Store

    opened = Store(store)
    opened.check()
    shown.told(opened, pointer.rollback(opened, version, reason, force, by))


@app.command()
def withdraw(
    version: Version,
    store: Where,
    reason: Reason,
    force: Annotated[bool, typer.Option("--force", help="though it is current; then no release is")] = False,
    by: By = None,
):
    """Say that a release may not be current any more; names the releases that came from it. Its files stay.

    Example: `unlearn release withdraw v2 --store s3://bucket/releases --reason "trained on the wrong shards"`
    """
    from unlearn.cli.console import out
    from unlearn.releases import pointer
    from unlearn.releases.store import Store

    opened = Store(store)
    state, line = pointer.withdraw(opened, version, reason, force, by)
    out.print(f"{version}: withdrawn")
    for each in line:
        withdrawn = ", which is withdrawn too" if each.version in state.withdrawn else ""
        out.print(f"{each.version} came from it ({each.how} {each.of}){withdrawn}: look whether it must go too")
    shown.told(opened, state)
