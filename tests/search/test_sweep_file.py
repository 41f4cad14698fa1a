"""SWEEP.yaml: every mistake by its message, and the points of its search space."""

import copy
import itertools

import pytest
import yaml

from jobs.sweep import prepare
from unlearn import config
from unlearn.errors import ConfigError, WeightsError
from unlearn.search import objectives, sweep_file
from unlearn.search.sweep_file import parse

RUN = {
    "model": {"weights": "embedded:fashion-mae"},
    "data": {"train": "embedded:fashion", "split": "train", "forget": {"classes": ["Bag"]},
             "retain": {"exclude_classes": ["Bag"]}},
    "training": {"engine": "torch", "steps": 8, "batch_size": 8}, "cluster": {"workers": 1},
    "evaluation": {"data": "embedded:fashion", "split": "test", "features": "pixels"},
}  # fmt: skip
SWEEP = {
    "sweep_dir": "runs/sweep", "run": RUN, "search": {"method.alpha": {"choice": [0.1, 0.5]}},
    "objectives": {"retain.cosine.drop": "minimise"}, "search_by": "grid",
}  # fmt: skip


def made(search: dict | None = None, run: dict | None = None, **keys) -> dict:
    """SWEEP with other keys; run: "a.b" -> value of the run."""
    tree = copy.deepcopy(SWEEP) | keys
    tree["run"] = config.override(tree["run"], [f"{key}={value}" for key, value in (run or {}).items()])
    return tree | ({"search": search} if search is not None else {})


MISTAKES = {
    # keys of the sweep
    "no search": (made({}), "search"),
    "unknown key": (made(serach_by="tpe"), "serach_by: unknown key; did you mean search_by?"),
    "unknown way": (made(search_by="best"), "search_by: Input should be"),
    "seed twice": (made(seeds=[1, 1]), "seeds: a value is there twice"),
    "seed below 0": (made(seeds=[-1]), "seeds.0: Input should be greater than or equal to 0"),
    "no direction": (made(objectives={"retain.fid": "down"}), "objectives.retain.fid: Input should be 'minimise' or"),
    "no time": (made(budget={"seconds": "2 weeks"}), "budget.seconds: write a time as seconds, or like 90min, 2h, 1d"),
    "no slots": (made(concurrent=0), "concurrent: Input should be greater than"),
    "no end": (made(search_by="random"), "budget: search_by random has no end of its own"),
    "storage": (made(storage="sqlite:///a.db"), "storage is for tpe and nsga2; search_by grid needs none"),
    "stages": (made(measure_every=2), "measure_every is for stop_early asha or median"),
    "mlflow": (made(tracking_uri="http://here"), r"tracking_uri is for log_to: \[mlflow\]"),
    "held out": (made(tune_on={"data": "embedded:fashion", "split": "test"}), "tune_on names the images of run"),
    # what is searched
    "two kinds": (made({"method.alpha": {"choice": [1], "grid": [1]}}), "give exactly one of loguniform, uniform"),
    "no range": (made({"method.alpha": {"uniform": [1, 0]}}), r"uniform \[1, 0\]: give low < high"),
    "a log of 0": (made({"method.alpha": {"loguniform": [0, 1]}}), "both above 0"),
    "a range in a grid": (made({"method.alpha": {"uniform": [0, 1]}}), "search_by grid: method.alpha is a range"),
    "times alone": (made({"method.alpha": {"choice": [1], "times": 2}}), "times is for same_as"),
    "tied to nothing": (made({"data.forget.limit": {"same_as": "data.retain.limit"}}), "which is not searched"),
    "tied to a tie": (
        made({"data.forget.limit": {"choice": [4]}, "data.retain.limit": {"same_as": "data.forget.limit"},
              "training.log_every": {"same_as": "data.retain.limit"}}), "which is tied itself"),
    "on itself": (made({"method.alpha": {"choice": [1], "when": {"method.alpha": 1}}}), "when names the key itself"),
    "a circle": (
        made({"method.alpha": {"choice": [1], "when": {"training.lr": 1}},
              "training.lr": {"choice": [1], "when": {"method.alpha": 1}}}), "name each other in a circle"),
    "no such method": (made({"method.name": {"choice": ["encoder_l3"]}}), "search.method.name: .*no method"),
    "no such key": (made({"method.alfa": {"choice": [1]}}), "search.method.alfa: no such key .*; did you mean alpha?"),
    "a key of no part": (made({"training.lr.x": {"choice": [1]}}), "search.training.lr.x: no such key"),
    "a condition on nothing": (
        made({"method.alpha": {"choice": [1], "when": {"training.ls": 1}}}), "search.method.alpha.when: no such key"),
    "a value": (made({"method.alpha": {"choice": [1, -1]}}), "search.method.alpha: .*greater than or equal to 0"),
    "an end": (made({"training.lr": {"uniform": [-1, 1]}}, search_by="random", budget={"points": 1}),
               "search.training.lr: .*greater than"),
    **{f"set apart {key}": (made({key: {"choice": [1]}}), f"search.{key}: not to be searched: {why}")
       for key, why in sweep_file.SET_APART.items()},
    # the run
    "no run": (made(run={"training.steps": "null"}), "training: give exactly one of steps and epochs"),
    "no forgetting": (made({"training.lr": {"choice": [1]}}, {"method.name": "pretrain"}), "pretrain forgets nothing"),
    # figures
    "no figure": (made(objectives={"retain.beauty": "minimise"}), "objectives: no figure 'retain.beauty'"),
    "no view": (made(objectives={"retain[box 9].fid": "minimise"}), "names a view that is not measured; measured are"),
    "no oracle": (made(objectives={"forget.fid.to_oracle": "minimise"}), "needs evaluation.oracle in the run"),
    "no network": (made(objectives={"retain.lpips.rise": "minimise"}), "needs evaluation.lpips_weights in the run"),
    "no constraint": (made(constraints=["retain.fid < 3"]), "constraints: 'retain.fid < 3' is no constraint"),
    "no bound": (made(constraints=["retain.fid <= three"]), "is no constraint: write FIGURE <= NUMBER"),
    "no such bound": (made(constraints=["retain.x <= 3"]), "constraints: no figure 'retain.x'"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_told_before_anything_starts(mistake):
    tree, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        parse(tree, "sweep.yaml")


def test_an_original_that_is_not_there_is_told_at_once(tiny_model, tmp_path):
    sweep = parse(made(models=[tiny_model, str(tmp_path / "nowhere")], sweep_dir=str(tmp_path / "sweep")))
    with pytest.raises(WeightsError, match="no weights at .*nowhere"):
        prepare(sweep)
    assert not (tmp_path / "sweep").exists()


def test_keys_with_dots_can_be_overridden():
    text, overrides = yaml.safe_dump(SWEEP), ["search.method.alpha={choice: [1, 2, 3]}", "run.training.lr=0.5"]
    overrides += ["search.training.warmup_steps={choice: [0, 1]}", "objectives.retain.fid=minimise"]
    sweep = sweep_file.read(text, "sweep.yaml", overrides)
    assert sweep.size == 6 and list(sweep.objectives) == ["retain.cosine.drop", "retain.fid"]
    assert sweep.settings.training.lr == 0.5
    text = yaml.safe_dump(SWEEP | {"set": {"training.steps": 7, "training.clip": 0.1}})
    training = sweep_file.read(text, "sweep.yaml", ["set.training.steps=9"]).settings.training
    assert (training.steps, training.clip) == (9, 0.1), "what else is set stays"
    with pytest.raises(ConfigError, match="search.method.alpha.choice: Input should be a valid list"):
        sweep_file.read(text, "sweep.yaml", ["search.method.alpha={choice: 3}"])
    for without_value in ("run.training.clip", "set.training.clip", "search.training.lr", "run.=3"):
        with pytest.raises(ConfigError, match=f"--set {without_value}: write it as key=value"):
            sweep_file.read(text, "sweep.yaml", [without_value])
    with pytest.raises(ConfigError, match="--set run.seed=3: set is one value here"):
        sweep_file.read(yaml.safe_dump(SWEEP | {"set": "other.yaml"}), "sweep.yaml", ["run.seed=3"])


def test_a_section_that_is_set_as_a_whole_tells_what_it_leaves_out(logged):
    tree = SWEEP | {"set": {"training": {"steps": 7}, "data.forget": {"classes": ["Coat"]}, "seed": 3}}
    settings = sweep_file.read(yaml.safe_dump(tree), "sweep.yaml").settings
    assert settings.training.steps == 7 and settings.training.batch_size != 8
    told = [record.message for record in logged.records if record.levelname == "WARNING"]
    assert len(told) == 1 and "set: training is set as a whole, so training.batch_size, training.engine of" in told[0]


def test_tied_and_conditional_keys_and_equal_points_once():
    """Options of one method alone, searched or given by the run: where they are not set, equal points are one."""
    sweep = parse(made({
        "method.name": {"grid": ["encoder_l2", "decoupling"]},
        "method.noise": {"grid": ["standard", "batch"], "when": {"method.name": "encoder_l2"}},
        "data.forget.limit": {"grid": [4, 8]},
        "data.retain.limit": {"same_as": "data.forget.limit", "times": 2},
    }, {"method.alpha": 0.5}))  # fmt: skip
    points = sweep.grid()
    assert len(points) == sweep.size == 6
    assert all(point["data.retain.limit"] == 2 * point["data.forget.limit"] for point in points)
    assert all(("method.noise" in point) == (point["method.name"] == "encoder_l2") for point in points)
    runs = [sweep.of(point, *sweep.pairs()[0], "x") for point in points]
    assert {(run.method.name, run.data.retain.limit) for run in runs} == {
        (name, limit) for name in ("encoder_l2", "decoupling") for limit in (8, 16)
    }


def test_points_that_are_drawn_are_a_function_of_the_seed_and_within_their_ranges():
    keys = {"search_by": "random", "budget": {"points": 9}}
    search = {
        "training.lr": {"loguniform": [1e-5, 1e-3]}, "method.alpha": {"uniform": [0, 1]},
        "training.warmup_steps": {"randint": [0, 3]}, "data.forget.classes": {"choice": [["Bag"], ["Coat", "Shirt"]]},
    }  # fmt: skip

    def drawn(**more) -> list:
        sweep = parse(made(search, {"data.retain": "{classes: [Dress]}"}, **keys, **more))
        return list(itertools.islice(sweep.drawn(), 50))

    points = drawn()
    assert points == drawn() != drawn(search_seed=1)
    assert all(1e-5 <= point["training.lr"] <= 1e-3 and 0 <= point["method.alpha"] <= 1 for point in points)
    assert {point["training.warmup_steps"] for point in points} == {0, 1, 2, 3}
    assert sum(point["training.lr"] < 1e-4 for point in points) in range(15, 36)


def test_figures_of_a_document():
    """Whatever metrics.json has of a set under a view, and nothing for what could not be measured."""
    row = {"generator": "unlearned", "set": "retain", "cosine": 0.5, "psnr": None, "ssim": 0.25, "fid": float("nan"),
           "is": None, "kid": 0.125}  # fmt: skip
    document = {"views": ["centre", "random"], "rows": [
        {**row, "view": "centre", "lpips": 0.75}, {**row, "view": "random"},
        {**row, "view": "centre", "generator": "original"},
    ]}  # fmt: skip
    found = objectives.of_document(document, "unlearned")
    plain = {"cosine": 0.5, "ssim": 0.25, "kid": 0.125}
    assert found == {
        **{f"{name}.{metric}": value for name in ("retain", "retain[centre]", "retain[random]")
           for metric, value in plain.items()},
        "retain.lpips": 0.75, "retain[centre].lpips": 0.75,
    }  # fmt: skip
    assert objectives.derived(found, {"retain.lpips": 0.5}, {})["retain.lpips.rise"] == 0.25
