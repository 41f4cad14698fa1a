"""Two cycles on embedded images as a story: requests come in, are served, certified and verified; behind `unlearn demo
--cycle`."""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path

from jobs import cycle as job
from jobs.cycle import Shown
from unlearn import certificate
from unlearn.config import location
from unlearn.cycles import cycle_file, history, page
from unlearn.cycles.cycle import Cycle
from unlearn.cycles.records import NEW, OLD, Records
from unlearn.errors import CycleError
from unlearn.ledger import letter, verification
from unlearn.ledger.ledger import Ledger
from unlearn.releases import verification as releases

CONFIG = "configs/cycle_fashion.yaml"
FIRST, SECOND = ("Sneaker", "Bag"), ("Sandal",)  # what is asked before each cycle
TITLES = {NEW: "asked now", OLD: "asked before", "retain": "everything else"}


def demo_cycle(folder: str | None = None, overrides: Sequence[str] = ()) -> Cycle:
    """The demo's cycle, everything in one folder. overrides: "key=value" of the cycle, "run.key=value" of its run."""
    where = location(folder or f"runs/demo-cycle-{datetime.now():%Y%m%d-%H%M%S}")
    places = {"cycle_dir": "cycles", "ledger": "ledger.sqlite", "releases": "releases", "key": "releases.key"}
    changes = [f"{key}={json.dumps(f'{where}/{name}')}" for key, name in places.items()]
    return cycle_file.read((files("jobs") / CONFIG).read_text(), "demo", [*changes, *overrides])


def story(cycle: Cycle, say: Callable[[str], None], shown: Shown) -> str:
    """Run it, telling what happens; the URI of the page. What was done before a stop is not done again."""
    assert cycle.key and cycle.ledger, "the demo's own"
    public = _keys(cycle)
    with Ledger(cycle.ledger, create=True) as ledger:
        for number, asked in enumerate((FIRST, SECOND), 1):
            _ask(ledger, asked, sum(map(len, (FIRST, SECOND)[: number - 1])), say)
            _serve(cycle, number, say, shown)
            _verify(cycle, number, public, say)
        say("\nWhat the person behind request 1 is told (`unlearn request letter 1`):")
        say("\n".join(f"  | {line}" for line in letter.write(ledger, 1).splitlines()))
        report = verification.verify(ledger)
        report.check(ledger.name)
        say(f"\nThe ledger is whole: {report.walk.tree.size} entries, each a leaf of a Merkle tree.")
    return page.write(cycle, key=certificate.public_key(public))[0]


def _keys(cycle: Cycle) -> str:
    """The path of the public key; the pair is made where it is not there."""
    name = str(cycle.key).removesuffix(".key")
    if not Path(f"{name}.pub").exists():
        certificate.generate(name)
    return f"{name}.pub"


def _ask(ledger: Ledger, asked: Sequence[str], before: int, say: Callable[[str], None]) -> None:
    """Record what is asked, if that was not done: `before` requests came before."""
    if len(ledger.requests()) <= before:
        ledger.add([{"forget": {"classes": [name]}} for name in asked], by="demo")
    again = "Another request comes in" if before else "Two requests come in"
    say(f"\n{again}: forget every image of {' and of '.join(asked)}.")
    for request in ledger.requests(ids=range(before + 1, before + 1 + len(asked))):
        say(
            f"  request {request.id} is in the ledger as {request.commitment[:16]}..., due {request.due}; no name "
            "stands there"
        )


def _serve(cycle: Cycle, number: int, say: Callable[[str], None], shown: Shown) -> None:
    say(f"\nCycle {number} starts from the base model, with all that was ever asked.")
    with job.owned(cycle, "demo --cycle") as check:
        ended = job.run(cycle, shown, check)
    records = Records(cycle.cycle_dir)
    told = history.of(records)[number - 1]
    for judgement in told.tried:
        verdict = "passes it" if judgement.passed else "refuses it"
        say(f"  rung {judgement.rung}: the gate {verdict}, beside {judgement.parent or 'no earlier release'}")
    for name, title in TITLES.items():
        if name in told.figures:
            base, after = told.figures[name]["original"], told.figures[name]["unlearned"]
            say(
                f"  {title:16} similarity (cosine) {base['cosine']:.3f} -> {after['cosine']:.3f}, "
                f"PSNR in the hole {base['psnr']:.1f} -> {after['psnr']:.1f} dB"
            )
    if ended.outcome is not None and ended.outcome.due:
        raise CycleError(
            "no rung of the demo's ladder passed the gate: retraining is due; see the page of the cycle's run"
        )
    last = told.ends[-1]
    say(f"  {last.release} is released and current; request(s) {', '.join(map(str, last.numbers))} are served")


def _verify(cycle: Cycle, number: int, public: str, say: Callable[[str], None]) -> None:
    told = history.of(Records(cycle.cycle_dir))[number - 1]
    folder = str(told.ends[-1].folder)
    release = releases.verify(folder, certificate.public_key(public))
    say(
        f"  verified offline, with nothing but the folder and the public key: {len(release.files) + 1} files as they "
        "were signed"
    )
    say(f"    unlearn release verify {folder} --key {public}")
    say(f"  it claims: {release.claimed[2]}")
    say(f"  and does not claim {release.not_claimed[0]}")
