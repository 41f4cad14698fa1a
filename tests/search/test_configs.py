"""The ready sweeps: each can be read, and so can the run of each of its points."""

from pathlib import Path

import pytest

from unlearn.search import space

CONFIGS = sorted((Path(__file__).parents[2] / "jobs/configs").glob("sweep_*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_point_of_a_ready_sweep_is_a_run(path):
    sweep = space.load(str(path))
    points = sweep.grid()
    runs = [sweep.of(point, seed, model, "x") for point in points for seed, model in sweep.pairs()]
    assert len({run.hash() for run in runs}) == len(points) * len(sweep.pairs()) > 20
    assert sweep.run["evaluation"]["data"] not in (sweep.tune_on.data, sweep.run["data"]["train"])


def test_there_is_one_of_each_kind_for_each_family():
    families = {(path.stem.split("_")[1], space.load(str(path)).settings.model.family) for path in CONFIGS}
    assert families == {
        (kind, family) for kind in ("alpha", "proxy") for family in ("mae", "mage", "diffusion", "migan")
    }
