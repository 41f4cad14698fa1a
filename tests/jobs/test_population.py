"""Population based training: who goes on from whom, after a kill too, and that what comes of it is a run like any."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.runs import train
from support.sweeps import tiny_tree

from jobs.desk import Event
from jobs.population import Population
from jobs.promote import promote
from jobs.sweep_state import SweepState
from unlearn import config
from unlearn.data.storage import Storage
from unlearn.errors import CheckpointError, ConfigError
from unlearn.run import resolve
from unlearn.search import alone, page, sweep_file
from unlearn.search.records import Trial, Trials
from unlearn.search.space import Sweep
from unlearn.training import metrics
from unlearn.training.checkpoint import Checkpoints
from unlearn.training.export import export
from unlearn.training.loop import worker

RANGE = {"training.lr": {"loguniform": [1e-4, 1e-1]}}


def pbt(folder, tiny_shards, tiny_model, **keys) -> Sweep:
    """Four points, three stages of two steps each, in this process."""
    return sweep_file.parse(tiny_tree(
        folder, tiny_shards, tiny_model, "training.engine=torch", "training.steps=6",
        **{"search": RANGE, "search_by": "pbt", "budget": {"points": 4}, "measure_every": 2} | keys,
    ))  # fmt: skip


def play(sweep: Sweep, kills: tuple[int, ...] = ()) -> dict[str, Trial]:
    """The trials of a sweep whose process is killed at the end of the legs of these numbers, before it tells of them.

    Points are judged by their loss, which costs nothing to measure."""
    turn = 0

    def started() -> tuple[SweepState, Population]:
        state = SweepState(sweep, lambda run: run)
        return state, Population(sweep, state)

    state, population = started()
    while (given := population.suggest(f"t{turn}")) != "FINISHED":
        assert isinstance(given, dict)
        for leg in state.legs(given["point"], given["stage"]):
            run, until = leg.run[0], leg.until
            worker(run, until=until)
            export(run)
            if turn in kills:
                state, population = started()
                break
            row = metrics.read(run.folder)[-1]
            figures = {"retain.cosine.drop": row["loss"], "forget.cosine.drop": row["forget"]}
            outcome = {"step": until, "figures": figures, "original": {}, "oracle": {}, "seconds": {}}
            state.measured(Event("measured", leg.trial, leg.point, 0, outcome | {"training_seconds": 0.0}))
        else:
            population.on_trial_complete(f"t{turn}")
        turn += 1
    return state.trials


@pytest.fixture(scope="module")
def populations(tmp_path_factory, tiny_shards, tiny_model) -> list[tuple[Sweep, dict[str, Trial]]]:
    """(the sweep, its trials): undisturbed, and killed in each stage."""
    made = []
    for kills in ((), (2, 6, 10)):
        sweep = pbt(tmp_path_factory.mktemp("population"), tiny_shards, tiny_model)
        made.append((sweep, play(sweep, kills)))
    return made


def test_the_worst_goes_on_from_the_best_and_a_kill_changes_nothing(populations):
    (sweep, trials), (_, disturbed) = populations
    assert [replace(t, ended="") for t in disturbed.values()] == [replace(t, ended="") for t in trials.values()]
    assert len(trials) == 4
    assert all([stage["step"] for stage in trial.stages] == [2, 4, 6] for trial in trials.values())
    for stage in (0, 1):
        figures = {t.point: t.stages[stage]["figures"]["retain.cosine.drop"] for t in trials.values()}
        heirs = {t.point: t.stages[stage]["from"] for t in trials.values() if "from" in t.stages[stage]}
        assert heirs == {max(figures, key=figures.__getitem__): min(figures, key=figures.__getitem__)}
    assert all("from" not in trial.stages[2] for trial in trials.values())
    assert {t.id: t for t in Trials(Storage(sweep.sweep_dir)).all()} == trials
    page.write(sweep, list(trials.values()), {})
    assert "lr_changes" in Storage(sweep.sweep_dir).read("report.html").decode()


def test_an_heir_is_the_run_that_its_rates_make(populations, tmp_path):
    """In one go and without a sweep: same weights to the bit, same rows; promoted it says its rates."""
    sweep, trials = populations[0]
    heir = next(trial for trial in trials.values() if "training.lr_changes" in trial.parameters)
    settings = alone.settings(sweep, heir, str(tmp_path / "alone"))
    low, high = RANGE["training.lr"]["loguniform"]
    assert all(low <= rate <= high for rate in (settings.training.lr, *settings.training.lr_changes.values()))
    train(settings)
    where = Storage(sweep.sweep_dir).where(heir.run)
    weights = [Path(folder, "model/weights.safetensors").read_bytes() for folder in (where, settings.run_dir)]
    assert weights[0] == weights[1]
    rates = [[row["lr"] for row in metrics.read(folder)] for folder in (where, settings.run_dir)]
    assert rates[0] == rates[1] and len(rates[0]) == 6
    plain = settings.model_copy(update={"training": settings.training.model_copy(update={"lr_changes": {}})})
    train(plain.model_copy(update={"run_dir": str(tmp_path / "plain")}))
    assert Path(tmp_path, "plain/model/weights.safetensors").read_bytes() != weights[0]

    promote(sweep, heir, str(tmp_path / "promoted"))
    promoted = config.load(tmp_path / "promoted/config.yaml")
    assert promoted.training.lr_changes == settings.training.lr_changes and promoted.hash() == heir.config_hash


def test_a_checkpoint_goes_on_with_another_rate_from_there_alone(populations):
    """Its hash tells of the changes before it, so what it was trained with cannot be changed behind its back."""
    sweep, trials = populations[0]
    settings = alone.settings(sweep, next(iter(trials.values())))
    state = Checkpoints(settings.run_dir, 9).state(4)
    run, changes = resolve(settings), settings.training.lr_changes

    def with_changes(changed):
        training = settings.training.model_copy(update={"lr_changes": changed})
        return replace(run, settings=settings.model_copy(update={"training": training}))

    state.check(with_changes(changes | {4: 0.5}), "here")
    with pytest.raises(CheckpointError, match="written with another config"):
        state.check(with_changes(changes | {3: 0.5}), "here")


def test_mistakes_of_a_population(tiny_shards, tiny_model, tmp_path):
    for keys, message in (
        (
            {"search": RANGE | {"method.alpha": {"uniform": [0, 1]}}},
            "search.method.alpha: search_by pbt changes values in",
        ),
        ({"search": RANGE | {"training.batch_size": {"choice": [8]}}}, "which only training.lr allows"),
        ({"search": {"training.lr": {"choice": [1e-3, 1e-2]}}}, "needs a range: loguniform or uniform"),
        ({"stop_early": "asha"}, "the worst go on from the best; leave it out"),
        ({"budget": {"points": 1}}, "give points alone, 2 or more"),
        ({"budget": {"points": 4, "seconds": "1h"}}, "give points alone, 2 or more"),
        ({"storage": "sqlite:///x.db"}, "storage is for tpe and nsga2"),
        ({"set": {"training.lr_changes": {"2": 0.1}}}, "training.lr_changes: search_by pbt finds them"),
    ):
        with pytest.raises(ConfigError, match=message):
            pbt(tmp_path, tiny_shards, tiny_model, **keys)
    searched = {"search": {"training.lr_changes": {"choice": [{}]}}, "search_by": "random"}
    with pytest.raises(ConfigError, match="not to be searched: search_by: pbt finds them"):
        pbt(tmp_path, tiny_shards, tiny_model, **searched, measure_every=None)
