"""Areas under ROC curves, intervals, and how a figure becomes a verdict."""

import numpy as np
import pytest

from unlearn.audit import base, statistics
from unlearn.audit.base import FAIL, NOT_SHOWN, PASS, Figure, Rule
from unlearn.audit.statistics import Estimate


def test_auc_is_the_chance_that_a_positive_scores_higher():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 9, 40), rng.integers(0, 7, 30)
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert statistics.auc(positive, negative) == pytest.approx(np.mean(pairs))


def test_positives_are_found_without_more_false_alarms_than_allowed():
    negative = np.arange(100.0)
    positive = np.array([98.5, 99.5, 50, 97.5])
    assert statistics.tpr_at(positive, negative, 0.01) == 0.5  # above 98: one false alarm, the 99
    assert statistics.tpr_at(positive, negative, 0.001) == 0.25  # none is allowed
    assert statistics.tpr_at(positive, negative, 1) == 1


def test_an_interval_covers_the_truth_as_often_as_it_says():
    inside = 0
    for seed in range(200):
        sample = np.random.default_rng(seed).exponential(1.0, 80)
        interval = statistics.bootstrap(statistics.average, sample, resamples=200, seed=seed).interval(0.9)
        assert interval is not None
        low, high = interval
        inside += low <= 1 <= high
    assert 0.83 <= inside / 200 <= 0.95


def test_estimates_of_one_seed_are_paired_and_repeat():
    rng = np.random.default_rng(0)
    sample = rng.normal(0, 10, 100)
    one = statistics.bootstrap(statistics.average, sample, resamples=100, seed=3)
    other = statistics.bootstrap(statistics.average, sample + 1, resamples=100, seed=3)
    assert other.minus(one).interval(0.95) == (pytest.approx(1), pytest.approx(1)), "what both share falls out"
    again = statistics.bootstrap(statistics.average, sample, resamples=100, seed=3)
    assert (again.draws == one.draws).all()
    assert (statistics.bootstrap(statistics.average, sample, resamples=100, seed=4).draws != one.draws).any()


def estimate(value, width=0.1):
    return Estimate(value, np.linspace(value - width, value + width, 101))


def verdict(rule, **known) -> str:
    judged = base.judge(Figure("f", "figure", {name: estimate(*v) for name, v in known.items()}, rule), 0.95)
    assert judged is not None
    return judged.verdict + (" open" if judged.open else "")


def test_a_reason_tells_the_difference_that_was_judged():
    """Which is known better than either figure where both rest on the same images."""
    known = {"original": estimate(5), "unlearned": estimate(1.2, 3), "oracle": estimate(1, 3)}
    judged = base.judge(Figure("f", "figure", known, Rule("above", 0.5), 1), 0.95)
    assert judged is not None and judged.verdict == PASS
    assert "1.2 [-1.6, 4.0], oracle 1.0, difference 0.2 [0.2, 0.2], margin 0.5" in judged.reason
    known |= {"oracle": statistics.constant(0)}
    judged = base.judge(Figure("f", "figure", known, Rule("above", 0.5), 1), 0.95)
    assert judged is not None and "difference" not in judged.reason, "it is the figure itself"


def test_a_figure_passes_within_the_margin_where_the_original_would_fail():
    above = Rule("above", 1.0)
    assert verdict(above, original=(5,), unlearned=(0.5,), oracle=(0,)) == PASS
    assert verdict(above, original=(5,), unlearned=(-9,), oracle=(0,)) == PASS, "further from the original is no trace"
    assert verdict(above, original=(5,), unlearned=(3,), oracle=(0,)) == FAIL
    assert verdict(above, original=(0.9,), unlearned=(0.5,), oracle=(0,)) == NOT_SHOWN, "the original passes too"
    assert verdict(above, original=(0.9,), unlearned=(3,), oracle=(0,)) == FAIL, "a finding needs no control"
    assert verdict(above, unlearned=(0.5,), oracle=(0,)) == NOT_SHOWN
    assert verdict(above, original=(5,), unlearned=(1, 9), oracle=(0,)) == f"{NOT_SHOWN} open", "too wide"
    assert verdict(above, original=(5,), unlearned=(0,)) == NOT_SHOWN, "no oracle"


def test_without_an_oracle_or_room_for_a_finding_nothing_is_shown():
    known = Rule("apart", 0.05, known=0.5)
    assert verdict(known, original=(0.7, 0.01), unlearned=(0.5, 0.01)) == NOT_SHOWN
    assert verdict(known, original=(0.7, 0.01), unlearned=(0.6, 0.01)) == FAIL
    assert verdict(known, original=(0.7, 0.01), unlearned=(0.5, 0.01), oracle=(0.5, 0.01)) == PASS
    top = Rule("above", 0.05, power=False, most=1.0)
    assert verdict(top, unlearned=(1.0, 0), oracle=(0.97, 0)) == NOT_SHOWN, "nothing lies above 1"
    assert (
        verdict(top, unlearned=(0.9, 0), oracle=(0.9, 0)) == PASS
        and verdict(top, unlearned=(1, 0), oracle=(0.9, 0)) == FAIL
    )


def test_a_figure_rests_on_the_kind_of_images_that_there_are_fewest_of():
    rng = np.random.default_rng(0)
    few = statistics.bootstrap(statistics.auc, rng.normal(size=200), rng.normal(size=3), resamples=20, seed=0)
    rule, known = Rule("apart", 0.05), {"original": estimate(0.9), "unlearned": few, "oracle": statistics.constant(0.5)}
    judged = base.judge(Figure("f", "figure", known, rule), 0.95)
    assert judged is not None and judged.verdict == NOT_SHOWN and "rests on 3 images" in judged.reason and judged.open
    each = statistics.bootstrap(lambda rows, drawn: 0.0, np.ones(50), resamples=20, seed=0, trainings=3)
    assert each.images == 50, "trainings are no images"


def test_a_figure_may_be_a_finding_on_either_side_or_below():
    assert verdict(Rule("apart", 1), original=(5,), unlearned=(-3,), oracle=(0,)) == FAIL
    assert verdict(Rule("apart", 1), original=(5,), unlearned=(0.5,), oracle=(0,)) == PASS
    kept = Rule("below", 1, against="original", power=False)
    assert verdict(kept, original=(5,), unlearned=(4.5,)) == PASS
    assert verdict(kept, original=(5,), unlearned=(9,)) == PASS
    assert verdict(kept, original=(5,), unlearned=(3,)) == FAIL


def test_several_oracles_are_one_reference():
    rule = Rule("above", 1)
    assert verdict(rule, original=(5,), unlearned=(1.5,), oracle=(0,)) == FAIL
    assert verdict(rule, original=(5,), unlearned=(1.5,), oracle=(0,), oracle_2=(2,)) == PASS


def test_one_finding_decides_and_an_open_question_blocks():
    judged = {v: base.Judgement(v, "") for v in (PASS, FAIL, NOT_SHOWN)}
    undecided = base.Judgement(NOT_SHOWN, "", open=True)
    assert base.combined([judged[PASS], judged[FAIL]]) == FAIL
    assert base.combined([judged[PASS], judged[NOT_SHOWN]]) == PASS
    assert base.combined([judged[PASS], undecided]) == NOT_SHOWN
    assert base.combined([judged[NOT_SHOWN]]) == base.combined([]) == NOT_SHOWN


@pytest.mark.parametrize(("count", "plain"), [(2, 55), (3, 78), (5, 86)])
def test_an_interval_over_few_draws_holds_the_truth_as_often_as_it_says(count, plain):
    """400 means of normal values of mean 0; plain: the most that a bootstrap without widening holds, in percent."""
    rng, held = np.random.default_rng(count), {True: 0, False: 0}

    def mean(rows, drawn):
        return float(rows[:, drawn].mean())

    for seed in range(400):
        rows = rng.normal(size=(1, count))
        for wide in held:
            statistic = statistics.widened(mean, count) if wide else mean
            made = statistics.bootstrap(statistic, rows, resamples=100, seed=seed, trainings=count)
            low, high = made.interval(0.95)
            held[wide] += low <= 0 <= high
    assert held[True] >= 4 * 90 and held[False] < 4 * plain
    assert statistics.widened(mean, 1) is mean
