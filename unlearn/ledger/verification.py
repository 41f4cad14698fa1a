"""Whether a ledger is what it was: walked from end to end, and held against its checkpoints.

What a checkpoint has and the ledger has not was either tampered with, or lost when a backup was restored. The second is
told by whoever holds the signing key: a re-seal is an entry of its own, under a new signed checkpoint.
"""

from dataclasses import dataclass, field

from securesystemslib.signer import CryptoSigner, Key

from unlearn.errors import LedgerError
from unlearn.ledger import entry
from unlearn.ledger.checkpoints import Checkpoint, Checkpoints, common, differing
from unlearn.ledger.entry import Draft
from unlearn.ledger.ledger import Ledger, append, user
from unlearn.ledger.tree import WIDTH
from unlearn.ledger.walk import Reseal, Walk, walk

SHOWN = 20  # findings that a message lists


@dataclass
class Report:
    """What was found. holding: checkpoints that the ledger still agrees with; resealed: those that a re-seal explains;
    failing: the others; wrong: a sentence for each finding."""

    walk: Walk
    holding: list[Checkpoint] = field(default_factory=list)
    resealed: list[tuple[Checkpoint, Reseal]] = field(default_factory=list)
    failing: list[Checkpoint] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def check(self, name: str) -> None:
        """Raises LedgerError, with every finding, where there is one."""
        if self.wrong:
            more = f"\n  and {len(self.wrong) - SHOWN} more" if len(self.wrong) > SHOWN else ""
            lines = "".join(f"\n  {text}" for text in self.wrong[:SHOWN])
            raise LedgerError(f"{name}: the ledger is not what it was:{lines}{more}")


def verify(ledger: Ledger, uri: str | None = None, key: Key | None = None) -> Report:
    """Walk the whole ledger, and hold it against the checkpoints at `uri`, which `key` verifies.

    Raises LedgerError or StorageError where either cannot be read; what is found is in the report.
    """
    if uri is None or key is None:
        seen = walk(ledger)
        return Report(seen, wrong=list(seen.wrong))
    return _held_against(walk(ledger), Checkpoints(uri, key))


def checkpoint(ledger: Ledger, uri: str, signer: CryptoSigner) -> tuple[Checkpoint, bool]:
    """(the checkpoint of what the ledger holds now, whether it is new). Raises LedgerError where the ledger does not
    verify: what was tampered with is not signed."""
    there = Checkpoints(uri, signer.public_key)
    report = _held_against(walk(ledger), there)
    report.check(ledger.name)
    base = report.holding[-1] if report.holding else None
    if base and base.size == report.walk.tree.size:
        return base, False
    return there.write(report.walk, base, signer), True


def reseal(
    ledger: Ledger, uri: str, signer: CryptoSigner, reason: str, by: str | None = None, restored: int | None = None
) -> Checkpoint:
    """Record that a backup was restored, and sign a new checkpoint. restored: how many entries the backup held; needed
    where others were written since.

    Raises LedgerError where there is nothing to explain, or where the difference is not what a restore leaves behind.
    """
    there = Checkpoints(uri, signer.public_key)
    report = _held_against(walk(ledger), there)
    if not report.failing:
        report.check(ledger.name)
        raise LedgerError(
            f"{ledger.name}: agrees with every checkpoint at {there.storage.uri}: there is nothing to re-seal"
        )
    ours, shared = report.walk.tree.leaves, []
    if report.walk.wrong or there.wrong:
        report.check(ledger.name)
    for lost in report.failing:
        theirs = there.leaves(lost)
        if theirs is None:
            raise LedgerError(f"{lost.leaves_name}: missing or damaged, so nobody can say what the restore has lost")
        shared.append(same := common(ours, theirs))
        if (
            len(differing(ours, theirs)) != min(len(ours), len(theirs)) // WIDTH - same
        ):  # a restore changes all that follows
            report.check(ledger.name)
    same, size = min(shared), report.walk.tree.size
    if same != (size if restored is None else restored):
        raise LedgerError(
            f"{ledger.name}: it agrees with its checkpoints in its first {same} entries, and has {size - same} others "
            f"since; where a backup of {same} entries was restored, say so with --restored {same}"
        )
    lost = [{"size": each.size, "root": each.root} for each in report.failing]
    facts = {"common": same, "lost": max(each.size for each in report.failing) - same, "checkpoints": lost}
    # The number of the entry is the highest that was given, so that no request gets the number of one that was lost.
    highest = max(report.walk.last, *(each.requests for each in report.failing))
    private = {"by": by or user(), "reason": reason}
    with ledger.database.writing() as connection:
        append(connection, [Draft(entry.RESEALED, highest, private=private, evidence=facts)])
    base = report.holding[-1] if report.holding else None
    return there.write(walk(ledger), base, signer)


def _held_against(seen: Walk, there: Checkpoints) -> Report:
    report = Report(seen, wrong=[*seen.wrong, *there.wrong])
    size = seen.tree.size
    own = [each for each in there.all if each.ledger == seen.ledger]
    report.wrong += [f"{each.name}: of another ledger" for each in there.all if each.ledger != seen.ledger]
    report.holding = [each for each in own if each.size <= size and seen.tree.root(each.size) == each.root]
    signed = max((each.size for each in report.holding), default=0)
    for each in reversed(own):  # the latest has the most to name
        if each in report.holding:
            continue
        explained = [r for r in seen.reseals if each.key in r.checkpoints and r.position < signed]
        if explained:
            report.resealed.append((each, explained[0]))
        else:
            report.failing.append(each)
            report.wrong += _differences(report, there, each)
    return report


def _differences(report: Report, there: Checkpoints, failing: Checkpoint) -> list[str]:
    """A sentence for each entry that is not what the checkpoint has, and was not named before."""
    tree, named = report.walk.tree, report.walk.named
    size, theirs = tree.size, there.leaves(failing)
    if theirs is None:
        good = max((each.size for each in report.holding if each.size <= failing.size), default=0)
        return [
            (
                f"{failing.leaves_name}: missing or damaged; one of the entries {good} to {failing.size - 1} is not "
                f"what it was at {failing}"
            )
        ]
    start, told, hint = (
        common(tree.leaves, theirs),
        [],
        "where a backup was restored, record it with `unlearn request reseal`",
    )
    different = differing(tree.leaves, theirs)
    changed = [position for position in different if position not in named]
    gone = [position for position in range(size, failing.size) if position not in named]
    if changed and 1 < len(different) == min(size, failing.size) - start:
        told.append(f"entry {start} and all after it: rewritten since {failing}; {hint}")
    else:
        was = {theirs[p * WIDTH : (p + 1) * WIDTH]: p for p in changed}
        for position in changed:
            origin = was.get(tree.leaf(position))
            what = "changed" if origin is None else f"reordered, here stands entry {origin}"
            told.append(f"entry {position}: {what} since {failing}")
        if gone:
            which = f"entries {gone[0]} to {gone[-1]}" if len(gone) > 1 else f"entry {gone[0]}"
            told.append(f"{which}: cut off, which {failing} has; {hint}")
    named.update(changed, gone)
    return told
