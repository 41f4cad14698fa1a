"""What the commands on releases print, and what several of them do."""

import json
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from unlearn.releases.gate import Verdict
    from unlearn.releases.pointer import State
    from unlearn.releases.release import Release
    from unlearn.releases.store import Store


def verified(store: "Store", version: str, key: str) -> None:
    """Raise UnlearnError where the release is not as this public key has signed it."""
    from unlearn import certificate
    from unlearn.releases import verification

    release = store.release(version)
    store.complete(release)
    verification.verify(store.folder(release).uri, certificate.public_key(key))


def told(store: "Store", state: "State") -> None:
    """Which release is current, what was forced, and which requests it does not serve."""
    from unlearn.cli.console import out
    from unlearn.releases import pointer

    last = state.history[-1] if state.history else None
    if last and last.remembered:
        out.print(f"forced and recorded: it remembers {last.remembered} request(s) that others have served")
    out.print(f"current: {state.version or 'none'}")
    for request, versions in sorted(pointer.served(store, state)[1].items()):
        who = ", ".join(versions) or "no release that is not withdrawn"
        out.print(f"not served by it: request {request[:16]}; {who} serves it", soft_wrap=True)


def state_of(release: "Release", state: "State") -> str:
    """current, withdrawn, was current or published."""
    if release.version == state.version:
        return "current"
    if release.version in state.withdrawn:
        return "withdrawn"
    return "was current" if release.version in state.served else "published"


def show_verdict(verdict: "Verdict | None") -> None:
    """Every limit of a gate."""
    from unlearn.cli.console import out

    for check in verdict.checks if verdict else ():
        mark = {True: "passed", False: "FAILED", None: "not judged"}[check.passed]
        out.print(f"  {mark}: {check}", soft_wrap=True)


def show_claims(release: "Release") -> None:
    """What a release claims, and what not."""
    from unlearn.cli.console import out

    for title, sentences in (("Claimed:", release.claimed), ("Not claimed:", release.not_claimed)):
        out.print(title)
        for sentence in sentences:
            out.print(f"  - {sentence}", soft_wrap=True)


def list_rejected(found: list[dict[str, Any]], as_json: bool) -> None:
    """The candidates that the gate refused."""
    from unlearn.cli.console import out
    from unlearn.releases.gate import Verdict

    if as_json:
        typer.echo(json.dumps(found))
        return
    for about in found:
        out.print(f"{about['rejected'][:16]}  {about['name']}  {about['folder']}", soft_wrap=True)
        for check in Verdict.model_validate(about["gate"]).reasons:
            out.print(f"  {check}", soft_wrap=True)
    if not found:
        out.print("no candidate was rejected")


def short(value: Any) -> str:
    """A value in a line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 48 else f"{text[:45]}..."
