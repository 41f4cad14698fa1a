"""The gate: every limit is held against the right figure, and what cannot be judged does not pass unseen."""

import json

import pytest
from support.releases import finished

from unlearn.data.storage import Storage
from unlearn.errors import ConfigError
from unlearn.releases import figures, gate


@pytest.fixture
def measured(tmp_path):
    """measured(number, ...) -> (metrics, audit) of a run made up so."""

    def documents(number: int = 0, **about) -> gate.Documents:
        folder = Storage(finished(str(tmp_path / str(number)), number, **about))
        audit = json.loads(folder.read("audit.json")) if folder.is_file("audit.json") else None
        return json.loads(folder.read("metrics.json")), audit

    return documents


def test_figures_have_flat_names(measured):
    audit = {
        "tests": [
            {"test": "membership", "generator": "unlearned", "auc": 0.6, "tpr": [0.1, 0.2], "note": None, "ran": True}
        ]
    }
    known = figures.flat(*measured(audit=audit, oracle=0.3))
    assert known["metrics.unlearned.forget.cosine"] == known["metrics.unlearned.forget.centre 0.5.cosine"] == 0.4
    assert known["metrics.oracle.forget.random 0.25.cosine"] == 0.3 and known["metrics.training_seconds"] == 1.5
    assert "metrics.unlearned.forget.fid" not in known, "null is no figure"
    assert (
        known["audit.tests.membership.unlearned.auc"] == 0.6 and known["audit.tests.membership.unlearned.tpr.1"] == 0.2
    )
    assert not any(name.endswith("ran") for name in known)
    twice = {"tests": [{"generator": "unlearned", "auc": 0.1}, {"generator": "unlearned", "auc": 0.9}]}
    assert "audit.tests.unlearned.auc" not in figures.flat(measured()[0], twice), (
        "which of the two is meant is not known"
    )
    assert figures.flat({"x": float("nan")}) == {}


@pytest.mark.parametrize(
    "rule, passed, judged",
    [
        ({"max": 0.4}, True, 0.4),
        ({"max": 0.39}, False, 0.4),
        ({"min": 0.41}, False, 0.4),
        ({"base": {"max": -0.5}}, True, -0.5),
        ({"base": {"max": -0.51}}, False, -0.5),
        ({"base": {"min": -0.5, "relative": True}}, False, -0.5 / 0.9),
        ({"parent": {"max": -0.09}}, True, -0.1),
        ({"parent": {"max": -0.11}}, False, -0.1),
        ({"oracle": {"min": -0.1, "max": 0.11}}, True, 0.1),
        ({"oracle": {"max": 0.05}}, False, 0.1),
    ],
)
def test_a_limit_is_held_against_the_figure_or_its_change(measured, rule, passed, judged):
    rules = gate.parse({"metrics.unlearned.forget.cosine": rule})
    verdict = gate.judge(rules, measured(1, oracle=0.3), measured(2, forget=0.5))
    (check,) = verdict.checks
    assert check.judged == pytest.approx(judged) and verdict.passed is check.passed is passed
    assert verdict.reasons == ([] if passed else [check])
    assert check.why == (
        "within" if passed else "above" if check.max is not None and check.judged > check.max else "below"
    )


def test_what_cannot_be_judged(measured):
    cosine = "metrics.unlearned.forget.cosine"
    one = lambda rule, parent=None, name=cosine: gate.judge(gate.parse({name: rule}), measured(1), parent)  # noqa: E731
    missing = one({"max": 1}, name="metrics.unlearned.forget.cosin")
    assert not missing.passed and missing.checks[0].why == f"no such figure; did you mean {cosine}?"
    [optional] = one({"max": 1, "optional": True}, name="metrics.unlearned.forget.cosin").checks
    assert optional.passed is None and optional.why == "no such figure, and it is optional"
    first = one({"parent": {"max": 0}})
    assert first.passed and first.checks[0].passed is None and first.checks[0].why == "no parent"
    no_oracle = one({"oracle": {"max": 0}})
    assert not no_oracle.passed and no_oracle.checks[0].why == "no reference"
    assert one({"oracle": {"max": 0}, "optional": True}).passed
    metrics, audit = measured(2)
    otherwise = one({"parent": {"max": 9}}, (metrics | {"features": "inception"}, audit))
    assert not otherwise.passed and otherwise.checks[0].why == "measured otherwise"
    assert str(otherwise.checks[0]) == f"{cosine} against the parent: measured otherwise"


def test_mistakes_in_a_gate_are_all_told(tmp_path):
    path = tmp_path / "gate.yaml"
    path.write_text(
        "fid: {max: 1}\nmetrics.a: {}\nmetrics.b: {maximum: 3}\nmetrics.c: {min: 2, max: 1}\nmetrics.d: {base: {max: "
        "1}}\n"
        "metrics.e: {max: .nan}\nmetrics.unlearned.f: {base: {relative: true}}\n"
    )
    with pytest.raises(ConfigError) as told:
        gate.load(str(path))
    text = str(told.value)
    for part in ("fid: a figure is called", "metrics.a: give min, max", "metrics.b.maximum: unknown key",
        "min 2 is larger than max 1",
                 "metrics.d: base and oracle want", "metrics.e.max",
                 "metrics.unlearned.f.base: give min or max"):  # fmt: skip
        assert part in text, text
    path.write_text("- a\n")
    with pytest.raises(ConfigError, match="expected figures and their limits"):
        gate.load(str(path))
