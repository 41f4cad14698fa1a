"""The contract that every test of an audit meets, and how a figure becomes a verdict: one file with one AuditTest, and
one line in registry.AUDITS.

A test measures pieces of work, each with one generator, in any worker; from all of them it computes figures with
intervals for every generator. A figure with a rule is judged: the difference of the unlearned model to a reference (the
oracle, else a value known beforehand) must lie within a margin, and so must its interval.

    PASS        the whole interval lies within the margin, and the original model would have failed; of a figure that
                looks for damage the first is enough
    FAIL        the whole interval lies beyond it
    NOT SHOWN   neither: the interval crosses the margin or rests on too few images, there is no reference, or the
                original passes too, so that passing says nothing

That nothing was damaged says nothing of forgetting: a test that looks for traces, and the audit as a whole, has PASS
only where a figure of traces has.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from unlearn import config
from unlearn.audit import statistics
from unlearn.audit.statistics import Estimate
from unlearn.registry import AUDITS

if TYPE_CHECKING:
    from unlearn.audit.bench import Bench
    from unlearn.audit.subject import Subject

PASS, FAIL, NOT_SHOWN = "PASS", "FAIL", "NOT SHOWN"
ORIGINAL, UNLEARNED, ORACLE = "original", "unlearned", "oracle"
RULES = 2  # raised when figures or verdicts are made otherwise of the same pieces
EXPECTED = "expected without traces"  # a reference that is no model
# What the workers have measured, by (generator, what): arrays whose rows are images.
Measured = dict[tuple[str, str], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Piece:
    """What one worker measures at once. what: as the test names it; rows start .. stop of its set, where it works
    through one."""

    test: str
    generator: str
    what: str
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Rule:
    """When a figure is a finding. risk: whether it is one above the reference, below it, or on either side, by more
    than `margin`.

    known: the reference where there is no oracle, by which a figure can fail and not pass. against: "original" for
    what was to be kept. power: whether the original model must fail for passing to mean anything: so it is for traces,
    and not for damage. most: the largest value that there is.
    """

    risk: Literal["above", "below", "apart"]
    margin: float
    against: Literal["oracle", "original"] = "oracle"
    known: float | None = None
    power: bool = True
    most: float | None = None

    def beyond(self, difference: tuple[float, float]) -> Literal["yes", "no", "maybe"]:
        """Whether an interval of the difference to the reference lies beyond the margin."""
        low, high = difference
        above, below = low > self.margin, high < -self.margin
        yes = {"above": above, "below": below, "apart": above or below}[self.risk]
        no = {
            "above": high <= self.margin,
            "below": low >= -self.margin,
            "apart": -self.margin <= low and high <= self.margin,
        }[self.risk]
        return "yes" if yes else "no" if no else "maybe"


@dataclass(frozen=True)
class Figure:
    """One figure of a test. estimates: by generator. rule: None where it is told and not judged. curves: by generator,
    points (x, y) that the page draws. note: what a reader must know of it. absent: why there are no estimates."""

    name: str
    title: str
    estimates: dict[str, Estimate]
    rule: Rule | None = None
    digits: int = 3
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    note: str = ""
    absent: str = ""


@dataclass(frozen=True)
class Judgement:
    """verdict and reason of one figure. open: whether more images could have decided it. trace: whether it asks for
    traces of what was forgotten, and not for damage."""

    verdict: str
    reason: str
    open: bool = False
    trace: bool = True


class AuditTest:
    """Subclasses state what they are, what they need, their pieces and their figures.

    shows, hides: what the test can show, and what it cannot, in a sentence each. cost: of one generator, for people.
    needs: the sets without which it cannot be made, see unlearn.audit.subject. schema: raised when it measures
    otherwise than before under the same options.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    shows: ClassVar[str]
    hides: ClassVar[str]
    cost: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    schema: ClassVar[int] = 1
    Options: ClassVar[type[config.Part]] = config.Part

    def __init__(self, options: config.Part):
        self.options = options

    def missing(self, subject: "Subject") -> str | None:
        """Why it cannot be made on this run; None where it can."""
        absent = [name for name in self.needs if name not in subject.sets]
        return None if not absent else f"there are no images for it: {', '.join(subject.why(name) for name in absent)}"

    def reads(self, subject: "Subject", piece: Piece) -> list[Any]:
        """Plain values that `measure` of this piece depends on, besides its images and weights."""
        return []

    def pieces(self, subject: "Subject") -> list[Piece]:
        """The work, those of one generator together."""
        raise NotImplementedError

    def measure(self, piece: Piece, bench: "Bench") -> dict[str, np.ndarray]:
        """Arrays of numbers, the same in whatever worker; rows of pieces of one (generator, what) are put together in
        order."""
        raise NotImplementedError

    def figures(self, measured: Measured, subject: "Subject") -> list[Figure]:
        """The figures of all generators. No image and no id is in them."""
        raise NotImplementedError

    def batches(self, subject: "Subject", sets: Iterable[str], generators: Iterable[str] | None = None) -> list[Piece]:
        """Pieces that work through sets in batches, generator by generator; `what` is the set."""
        step = subject.settings.batch_size
        return [
            Piece(self.name, generator, name, start, min(start + step, len(subject.sets[name])))
            for generator in (subject.models if generators is None else generators)
            for name in sets
            for start in range(0, len(subject.sets[name]), step)
        ]


def oracles(names: Iterable[str]) -> list[str]:
    """The oracles among generators: there may be several, trained with other seeds."""
    return [name for name in names if name.startswith(ORACLE)]


def judge(figure: Figure, confidence: float) -> Judgement | None:
    """Hold a figure against its rule; None where it has none."""
    rule, known = figure.rule, figure.estimates
    if rule is None:
        return None

    def told(verdict: str, reason: str, open: bool = False) -> Judgement:
        return Judgement(verdict, reason, open, rule.power)

    if figure.absent or UNLEARNED not in known:
        return told(NOT_SHOWN, f"{figure.title}: {figure.absent or 'there is no unlearned model'}.")
    reference, name = _reference(rule, known)
    if reference is None:
        missing = "oracle (evaluation.oracle)" if rule.against == "oracle" else "original model"
        return told(NOT_SHOWN, f"{figure.title}: no {missing} to compare with.")
    said = f"{figure.title}: {_told(figure, known[UNLEARNED], confidence)}, {name} {reference.value:.{figure.digits}f}"
    if reference.value:  # what is judged is the difference, whose interval is often the narrower one
        said += f", difference {_told(figure, known[UNLEARNED].minus(reference), confidence)}"
    said += f", margin {rule.margin:g}"
    if (images := known[UNLEARNED].images) is not None and images < statistics.FEW:
        rests = f"it rests on {images} image{'s' * (images != 1)}, and an interval takes {statistics.FEW}"
        return told(NOT_SHOWN, f"{said}: {rests}.", open=True)
    found = rule.beyond(_difference(known[UNLEARNED], reference, confidence))
    if found == "yes":
        return told(FAIL, f"{said}: beyond the margin.")
    if found == "maybe":
        return told(NOT_SHOWN, f"{said}: the interval crosses the margin; more images could decide it.", open=True)
    if rule.power and not (
        ORIGINAL in known and rule.beyond(_difference(known[ORIGINAL], reference, confidence)) == "yes"
    ):
        original = _told(figure, known[ORIGINAL], confidence) if ORIGINAL in known else "not there"
        return told(NOT_SHOWN, f"{said}: within the margin, but so is the original ({original}): passing says nothing.")
    if name == EXPECTED:
        return told(NOT_SHOWN, f"{said}: within the margin, but without an oracle that does not show it.")
    if rule.most is not None and reference.value + rule.margin >= rule.most:
        return told(NOT_SHOWN, f"{said}: within the margin, beyond which nothing can lie: passing says nothing.")
    return told(PASS, f"{said}: within the margin.")


def combined(judgements: Sequence[Judgement]) -> str:
    """FAIL where any failed; PASS where one passed, one that asks for traces if any does, and none is open; else NOT
    SHOWN."""
    if any(judgement.verdict == FAIL for judgement in judgements):
        return FAIL
    asked = [judgement for judgement in judgements if judgement.trace] or judgements
    passed = any(judgement.verdict == PASS for judgement in asked)
    return PASS if passed and not any(judgement.open for judgement in judgements) else NOT_SHOWN


def _reference(rule: Rule, known: dict[str, Estimate]) -> tuple[Estimate | None, str]:
    if rule.against == "original":
        return known.get(ORIGINAL), "original"
    if found := [known[name] for name in oracles(known)]:
        return statistics.mean(found), "oracle" if len(found) == 1 else f"mean of {len(found)} oracles"
    return (None, "") if rule.known is None else (statistics.constant(rule.known), EXPECTED)


def _difference(one: Estimate, reference: Estimate, confidence: float) -> tuple[float, float]:
    difference = one.minus(reference)
    return difference.interval(confidence) or (difference.value, difference.value)


def _told(figure: Figure, estimate: Estimate, confidence: float) -> str:
    interval = estimate.interval(confidence)
    between = "" if interval is None else f" [{interval[0]:.{figure.digits}f}, {interval[1]:.{figure.digits}f}]"
    return f"{estimate.value:.{figure.digits}f}{between}"


def test_class(name: str) -> type[AuditTest]:
    """The class of a test. Raises ConfigError for an unknown one."""
    return AUDITS.load(name)


def document(test: AuditTest, figures: list[Figure], judgements: list[Judgement], confidence: float) -> dict[str, Any]:
    """One test in audit.json: what it is, its verdict with reasons, and {generator: {figure, figure_low,
    figure_high}}."""
    made: dict[str, Any] = {
        "title": test.title, "shows": test.shows, "hides": test.hides, "cost": test.cost,
        "options": test.options.model_dump(mode="json"), "verdict": combined(judgements),
        "open": any(judgement.open for judgement in judgements),
        "trace": any(judgement.trace for judgement in judgements),
        "reasons": [judgement.reason for judgement in judgements],
        "figures": {
            figure.name: {"title": figure.title, "digits": figure.digits, "judged": figure.rule is not None,
                "note": figure.note}
            for figure in figures
        },
    }  # fmt: skip
    for figure in figures:
        known = figure.estimates
        if len(several := oracles(known)) > 1:  # the one column is their mean, as in metrics.json; each is there too
            values = [known[name].value for name in several]
            each = {f"{ORACLE} {number}": known[name] for number, name in enumerate(several, 1)}
            known = {name: e for name, e in known.items() if name not in several}
            known |= {ORACLE: statistics.mean(list(each.values()))} | each
            made.setdefault(ORACLE, {})[f"{figure.name}_spread"] = round(float(np.std(values, ddof=1)), 6)
        for generator, estimate in known.items():
            row = made.setdefault(generator, {})
            row[figure.name] = round(estimate.value, 6)
            if interval := estimate.interval(confidence):
                row[f"{figure.name}_low"], row[f"{figure.name}_high"] = (round(end, 6) for end in interval)
    if curves := {figure.name: figure.curves for figure in figures if figure.curves}:
        made["curves"] = {name: {g: [list(p) for p in line] for g, line in c.items()} for name, c in curves.items()}
    return made
