"""The ready sweeps: each can be read, and so can the run of each of its points."""

import itertools
import re
from pathlib import Path

import pytest
import yaml

from unlearn.search import sweep_file

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "jobs/configs").glob("sweep_*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_point_of_a_ready_sweep_is_a_run(path):
    sweep = sweep_file.load(str(path))
    points = sweep.grid()
    runs = [sweep.of(point, seed, model, "x") for point in points for seed, model in sweep.pairs()]
    assert len({run.hash() for run in runs}) == len(points) * len(sweep.pairs()) > 20
    assert sweep.run["evaluation"]["data"] not in (sweep.tune_on.data, sweep.run["data"]["train"])


def test_there_is_one_of_each_kind_for_each_family():
    families = {(path.stem.split("_")[1], sweep_file.load(str(path)).settings.model.family) for path in CONFIGS}
    assert families == {
        (kind, family) for kind in ("alpha", "proxy") for family in ("mae", "mage", "diffusion", "migan")
    }


def test_the_sweep_of_the_docs_is_valid():
    text = re.findall(r"```yaml\n(.*?)```", (ROOT / "infra/docs/sweeps.md").read_text(), re.S)
    sweep = sweep_file.parse(yaml.safe_load(text[0]))
    for point in itertools.islice(sweep.drawn(), 3):
        assert sweep.of(point, *sweep.pairs()[0], "x").data.retain.per_class == 2 * point["data.forget.per_class"]
    population = sweep_file.parse(yaml.safe_load(text[0]) | yaml.safe_load(text[1]))
    assert population.search_by == "pbt" and population.stages(200) == [50, 100, 150, 200]
