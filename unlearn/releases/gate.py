"""The gate: thresholds over figures, in YAML, and the verdict, which is a value.

metrics.unlearned.forget.cosine: {max: 0.6}
metrics.unlearned.retain.cosine: {base: {min: -0.02}, parent: {min: -0.01}}
metrics.unlearned.retain.fid: {base: {max: 0.1, relative: true}}
audit.membership.unlearned.auc: {max: 0.55, oracle: {min: -0.05, max: 0.05}, optional: true}
"""

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unlearn import documents
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError
from unlearn.releases import figures

Against = Literal["base", "parent", "oracle"]
AGAINST: tuple[Against, ...] = ("base", "parent", "oracle")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Limits(_Part):
    min: float | None = Field(default=None, description="the smallest that passes")
    max: float | None = Field(default=None, description="the largest that passes")

    @model_validator(mode="after")
    def _in_order(self):
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is larger than max {self.max:g}")
        return self


class Change(Limits):
    """Limits of value - reference; relative: divided by the reference's absolute value."""

    relative: bool = False

    @model_validator(mode="after")
    def _limits_something(self):
        if self.min is None and self.max is None:
            raise ValueError("give min or max")
        return self


class Rule(Limits):
    """Limits of one figure, and of its change against the base, the parent and the oracle.

    optional: whether it passes where one of the figures is not there.
    """

    base: Change | None = None
    parent: Change | None = None
    oracle: Change | None = None
    optional: bool = False

    @model_validator(mode="after")
    def _says_something(self):
        if (self.min, self.max, self.base, self.parent, self.oracle) == (None,) * 5:
            raise ValueError("give min, max, base, parent or oracle")
        return self


Gate = dict[str, Rule]


class Check(BaseModel):
    """One limit held against one figure. value: the figure; reference: what it is compared with; judged: the value or
    the change that min and max hold for. passed: None where there was nothing to judge. why: "within", "below",
    "above", "no such figure", "no reference", "no parent", "measured otherwise", "reference is zero"."""

    model_config = ConfigDict(frozen=True)
    figure: str
    against: Against | None = None
    value: float | None = None
    reference: float | None = None
    judged: float | None = None
    relative: bool = False
    min: float | None = None
    max: float | None = None
    passed: bool | None = None
    why: str = ""

    def __str__(self) -> str:
        """A line for people."""
        what = self.figure + (f" against the {self.against}" if self.against else "")
        if self.judged is None:
            return f"{what}: {self.why}"
        unit = ".4g" if not self.relative else ".1%"
        limits = [
            f"{name} {limit:{unit}}" for name, limit in (("min", self.min), ("max", self.max)) if limit is not None
        ]
        compared = f" ({self.value:.4g}, {self.against} {self.reference:.4g})" if self.against else ""
        sign = "+" if self.against else ""
        return f"{what}: {self.judged:{sign}{unit}}{compared}, {self.why} {', '.join(limits)}"


class Verdict(BaseModel):
    """passed: whether nothing failed. checks: every limit, in the order of the gate."""

    model_config = ConfigDict(frozen=True)
    passed: bool
    checks: list[Check]

    @property
    def reasons(self) -> list[Check]:
        """What failed."""
        return [check for check in self.checks if check.passed is False]


def load(uri: str) -> Gate:
    """The gate in a YAML file. Raises ConfigError, StorageError."""
    try:
        tree = documents.from_yaml(Storage(uri).read().decode(errors="replace"))
        if not isinstance(tree, dict) or not tree:
            raise ValueError("expected figures and their limits, as in `metrics.unlearned.forget.cosine: {max: 0.6}`")
    except ValueError as e:
        raise ConfigError(f"gate {uri}: {e}") from None
    return parse(tree, f"gate {uri}")


def parse(tree: dict[Any, Any], source: str = "gate") -> Gate:
    """The same from plain values. Raises ConfigError with every mistake."""
    gate, wrong = {}, []
    for name, rule in tree.items():
        if not isinstance(name, str) or not name.startswith(("metrics.", "audit.")):
            wrong.append(f"{name}: a figure is called metrics.... or audit....")
            continue
        try:
            gate[name] = Rule.model_validate(rule)
        except ValidationError as e:
            for error in e.errors():
                where = ".".join([name, *map(str, error["loc"])])
                message = error["msg"].removeprefix("Value error, ")
                if error["type"] == "model_type":
                    message = "expected limits, as in {max: 0.6}"
                wrong.append(f"{where}: {message}".replace("Extra inputs are not permitted", "unknown key"))
            continue
        if (gate[name].base or gate[name].oracle) and figures.UNLEARNED not in name.split("."):
            wrong.append(f"{name}: base and oracle want a figure of the unlearned model, with `unlearned` in its name")
    if wrong:
        raise ConfigError(f"{source}: " + ("; ".join(wrong) if len(wrong) == 1 else "\n  " + "\n  ".join(wrong)))
    return gate


Documents = tuple[dict[str, Any], dict[str, Any] | None]


def judge(gate: Gate, candidate: Documents, parent: Documents | None) -> Verdict:
    """Hold (metrics, audit) of a candidate, and of its parent where it has one, against a gate."""
    own = figures.flat(*candidate)
    before = figures.flat(*parent) if parent else None
    alike = parent is None or figures.conventions(candidate[0]) == figures.conventions(parent[0])
    checks: list[Check] = []
    for name, rule in gate.items():
        if rule.min is not None or rule.max is not None or name not in own:
            checks.append(_absolute(name, rule, own))
        if name not in own:
            continue
        for against in AGAINST:
            change: Change | None = getattr(rule, against)
            if change is None:
                continue
            check = Check(
                figure=name, against=against, value=own[name], min=change.min, max=change.max, relative=change.relative
            )
            if against == "parent" and before is None:
                checks.append(check.model_copy(update={"why": "no parent"}))
            elif against == "parent" and not alike and name.startswith("metrics."):
                checks.append(check.model_copy(update={"passed": False, "why": "measured otherwise"}))
            else:
                known = before if against == "parent" else own
                other = name if against == "parent" else figures.counterpart(name, against)
                checks.append(_compared(check, (known or {}).get(other or ""), rule.optional))
    return Verdict(passed=all(check.passed is not False for check in checks), checks=checks)


def _absolute(name: str, rule: Rule, own: dict[str, float]) -> Check:
    check = Check(figure=name, value=own.get(name), min=rule.min, max=rule.max)
    if name in own:
        return _within(check, own[name])
    if rule.optional:
        return check.model_copy(update={"passed": None, "why": "no such figure, and it is optional"})
    near = difflib.get_close_matches(name, own, n=1)
    why = "no such figure" + (f"; did you mean {near[0]}?" if near else "")
    return check.model_copy(update={"passed": False, "why": why})


def _compared(check: Check, reference: float | None, optional: bool) -> Check:
    assert check.value is not None, "only a figure that is there is compared"
    if reference is None:
        return check.model_copy(update={"passed": None if optional else False, "why": "no reference"})
    change = check.value - reference
    check = check.model_copy(update={"reference": reference})
    if check.relative and not reference:
        return check.model_copy(update={"passed": False, "why": "reference is zero"})
    return _within(check, change / abs(reference) if check.relative else change)


def _within(check: Check, judged: float) -> Check:
    below, above = check.min is not None and judged < check.min, check.max is not None and judged > check.max
    why = "below" if below else "above" if above else "within"
    return check.model_copy(update={"judged": judged, "passed": not (below or above), "why": why})
