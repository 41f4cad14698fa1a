"""What Optuna makes of the records, and the curves of an ablation."""

from dataclasses import replace

import numpy as np
import pytest
from support import sweeps

from unlearn.search import ablation, charts, front, study
from unlearn.search.objectives import Objective
from unlearn.search.records import points


def test_importance_is_that_of_the_best_whatever_the_direction():
    """Large values are the better ones of one objective alone, and only alpha moves it."""
    drawn = [(a, s) for a in np.linspace(0, 1, 12).round(3).tolist() for s in (1, 2)]
    trials = [
        sweeps.trial(f"p{n:03d}", 0, {"method.alpha": a, "training.steps": s}, 0.5, a) for n, (a, s) in enumerate(drawn)
    ]
    up, down = Objective("retain.cosine", "maximise"), Objective("forget.cosine", "minimise")
    shares = study.importances(points(trials), [up, down])
    assert shares["retain.cosine"]["alpha"] > 0.9 and list(shares) == ["retain.cosine", "forget.cosine", "the front"]
    # A step at the best end alone is seen where that end is the better one, and not where it is the worse.
    skewed = [
        sweeps.trial(
            f"p{n:03d}",
            0,
            {"method.alpha": float(n % 12), "training.steps": n // 12},
            0.5,
            1.0 if n >= 18 else n % 12 / 100,
        )
        for n in range(24)
    ]
    worst = study.importances(points(skewed), [Objective("retain.cosine", "minimise")])["retain.cosine"]
    best = study.importances(points(skewed), [up])["retain.cosine"]
    assert best["steps"] > 0.3 > worst["steps"]
    assert study.importances(points(trials[:7]), [up]) == {}


def test_optunas_history_is_the_volume_of_the_front(tmp_path):
    sweep, every = sweeps.grid_sweep(tmp_path), points(sweeps.grid_trials(), sweeps.grid_sweep(tmp_path).bounds)
    losses, counted = front.table(every, sweep.wanted)
    drawn = next(one for one in charts.charts(every, sweep.wanted, sweep.bounds)["searched"] if one.id == "volume")
    complete = [point.complete for point in every]
    history = front.history(losses, front.reference(losses, counted), counted)[complete]
    assert list(drawn.figure.data[0].y) == pytest.approx(history) and history[-1] > history[0] > 0


def test_a_curve_holds_all_other_parameters_still():
    every = points(sweeps.grid_trials())
    assert list(ablation.parameters(every)) == ["method.alpha", "data.forget.per_class"]
    curves = ablation.curves(every, "method.alpha", "retain.cosine")
    assert [curve.fixed for curve in curves] == ["per_class 10", "per_class 40", "per_class 160", "per_class 600"]
    assert [at.x for at in curves[0].at] == sweeps.ALPHAS and [at.point for at in curves[0].at] == [
        "p000",
        "p004",
        "p008",
        "p012",
    ]
    assert len(curves[1].at[1].values) == 2  # without the trial that failed
    drawn = [sweeps.trial(f"p{n:03d}", 0, {"method.alpha": n / 7, "training.steps": n}, 0.5, 0.5) for n in range(6)]
    assert list(ablation.parameters(points(drawn))) == []


def test_curves_are_on_held_out_images_where_every_trial_was_measured_there():
    sweep, trials = sweeps.grid_sweep("unused"), sweeps.grid_trials()
    held_out = [replace(t, held_out={name: value + 1 for name, value in t.figures.items()}) for t in trials]

    def drawn(trials):
        every = points(trials, sweep.bounds)
        charted = charts.charts(every, sweep.wanted, sweep.bounds)["ablations"][0]
        return charted.caption, [line for line in charted.figure.data if line.mode == "lines+markers"][0].y

    caption, tuned = drawn([*held_out[:-1], trials[-1]])
    assert caption.startswith("On the images that were searched with")
    caption, judged = drawn(held_out)
    assert caption.startswith("On held-out images") and judged == pytest.approx([y + 1 for y in tuned])


def test_the_interval_is_students():
    assert ablation.interval([0.5]) is None
    assert ablation.interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4842, 2 + 2.4842), abs=1e-3)
    many = ablation.interval([0.0, 1.0] * 50)
    assert many == pytest.approx((0.5 - 0.0985, 0.5 + 0.0985), abs=1e-3)


def test_labels_and_values_are_short_and_differ():
    keys = ["method.alpha", "data.forget.per_class", "data.retain.per_class"]
    assert list(study.labels(keys).values()) == ["alpha", "forget.per_class", "retain.per_class"]
    one, other = study.text(list(range(100))), study.text([*range(99), 7])
    assert len(one) == len(other) <= 40 and one != other
    assert study.text({"75": 0.00123456, "150": 2.0}) == "75: 0.001235, 150: 2"
    assert [study.text(v) for v in (None, True, 0.123456, "box", [1, "a"])] == [
        "null",
        "true",
        "0.1235",
        "box",
        "[1, a]",
    ]


def test_parameters_of_any_kind_and_missing_ones_are_drawn():
    given = [
        {"method.name": "a", "method.x": n + 0.5} if n % 2 else {"method.name": "b", "data.forget.classes": [n % 3]}
        for n in range(10)
    ]
    trials = [sweeps.trial(f"p{n:03d}", 0, parameters, n / 10, 0.5) for n, parameters in enumerate(given)]
    wanted = [
        Objective("retain.cosine", "maximise"),
        Objective("forget.cosine", "minimise"),
        Objective("forget.cosine.drop", "maximise"),
    ]
    made = charts.charts(points(trials), wanted, [])
    assert [one.id for one in made["fronts"]] == ["front-0", "front-1"]
    assert [one.id for one in made["searched"]] == ["volume", "importance", "parallel"]
