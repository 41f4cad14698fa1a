"""Stopped anywhere, by anything, and resumed: the same weights to the bit."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from support.runs import export, tiny_config, worker
from support.workers import together

from unlearn.data import shards
from unlearn.errors import CheckpointError
from unlearn.training import metrics
from unlearn.training.checkpoint import Checkpoints

STEPS = 5
SHARDED = ["training.engine=deepspeed", "training.micro_batch_size=2", f"training.steps={STEPS}", "training.checkpoint_every=2"]


def weights_of(run) -> bytes:
    return Path(export(run), "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tiny_shards, tiny_model, tmp_path_factory):
    """{stage: an uninterrupted run of two workers}."""
    folder = tmp_path_factory.mktemp("whole")
    options = [(stage, [*SHARDED, "cluster.workers=2", f"training.zero_stage={stage}"]) for stage in (2, 3)]
    runs = {stage: tiny_config(folder / f"zero-{stage}", tiny_shards, tiny_model, *o) for stage, o in options}
    together(list(runs.values()), workers=2)
    return runs


KILLS = [*((step, "report") for step in range(1, STEPS)), (2, "written"), (4, "written"), (4, "committed")]


@pytest.fixture(scope="module")
def resumed(whole, tmp_path_factory):
    """{(stage, step, where): a run that was killed there and went on}. Each is killed in processes of its own; those that
    go on share theirs, which saves starting them."""
    runs = {}
    for stage, (step, where) in itertools.product(whole, KILLS):
        runs[stage, step, where] = run = whole[stage].model_copy(update={"run_dir": str(tmp_path_factory.mktemp("killed") / "run")})
        with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
            together([run], 2, kill_at=step, kill_in=where)
        assert Checkpoints(run.run_dir, 2).steps() == [s for s in (2, 4) if s < step or where == "committed"]
    together(list(runs.values()), 2)
    return runs


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("step", "where"), KILLS)
def test_killed_at_any_step_and_resumed_is_the_same_run(whole, resumed, stage, step, where):
    run = resumed[stage, step, where]
    assert not list(Path(run.run_dir).rglob(".part-*"))
    assert weights_of(run) == weights_of(whole[stage])
    assert [row["step"] for row in metrics.read(run.run_dir)] == [*range(1, STEPS + 1)]


def test_the_comparison_can_fail(whole, tmp_path):
    """Control: a run that resumes without the optimizer's state, or one with another seed, ends elsewhere."""
    for name, change in (("forgets", {}), ("seed", {"seed": 4})):
        run = whole[2].model_copy(update={"run_dir": str(tmp_path / name), **change})
        if name == "forgets":
            shutil.copytree(whole[2].run_dir, run.run_dir)
            shutil.rmtree(Path(run.run_dir, "checkpoints", f"step-{STEPS:08d}"))
            for file in Path(run.run_dir, "checkpoints").rglob("*.safetensors"):
                _zero_moments(file)
        together([run], 2)
        assert weights_of(run) != weights_of(whole[2])


def _zero_moments(file: Path) -> None:
    import hashlib

    from safetensors.torch import load_file, save_file

    save_file({k: t * 0 if k.startswith("exp_avg") else t for k, t in load_file(file).items()}, file)
    commit = file.parent / "COMMIT"
    tree = json.loads(commit.read_text())
    tree["files"][file.name] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    commit.write_text(json.dumps(tree))


def test_one_two_one_workers_see_the_same_batches(tiny_shards, tiny_model, tmp_path):
    """Elastic: the losses of every step are those of the run that was never resized."""
    for name, legs in (("steady", [(6, 1)]), ("resized", [(2, 1), (4, 2), (6, 1)])):
        for stop, workers in legs:
            options = ["training.engine=deepspeed", "training.micro_batch_size=2", f"cluster.workers={workers}", "training.steps=6"]
            run = tiny_config(tmp_path / name, tiny_shards, tiny_model, *options, "training.schedule=constant")
            if stop < 6:
                with pytest.raises(torch.multiprocessing.ProcessExitedException):
                    together([run], workers, kill_at=stop + 1)
            else:
                together([run], workers)
            assert Checkpoints(run.run_dir, 2).steps()[-1] == stop
    steady, resized = (metrics.read(str(tmp_path / name)) for name in ("steady", "resized"))
    assert [r["loss"] for r in resized] == pytest.approx([r["loss"] for r in steady], rel=1e-4)


def test_plain_torch_resumes_to_the_bit(tiny_run, tmp_path):
    whole = tiny_run()
    worker(whole)
    run = whole.model_copy(update={"run_dir": str(tmp_path / "stopped")})

    def stop(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker(run, stop)
    assert Checkpoints(run.run_dir, 2).steps() == [2]
    worker(run)
    assert weights_of(run) == weights_of(whole)


def test_the_newest_are_kept_and_what_was_not_committed_does_not_exist(tiny_run):
    run = tiny_run("training.steps=9", "training.keep_checkpoints=2")
    half = Path(run.run_dir, "checkpoints/step-00000001/rank-00000-of-00001.safetensors")
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half a checkpoint")
    worker(run)
    assert Checkpoints(run.run_dir, 2).steps() == [8, 9]
    assert sorted(p.name for p in Path(run.run_dir, "checkpoints").iterdir()) == ["step-00000008", "step-00000009"]


@pytest.mark.parametrize("damage", ["flip", "cut", "commit"])
def test_a_damaged_checkpoint_is_named(tiny_run, damage):
    run = tiny_run()
    worker(run)
    folder = Path(run.run_dir, "checkpoints/step-00000004")
    file = folder / ("COMMIT" if damage == "commit" else "rank-00000-of-00001.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="step-00000004.*damaged"):
        export(run)


def test_a_checkpoint_of_another_config_or_other_data_is_refused(tiny_run, tiny_shards, tmp_path):
    worker(tiny_run())
    with pytest.raises(CheckpointError, match="another config"):
        worker(tiny_run("method.alpha=0.5"))
    other = tmp_path / "shards"
    shutil.copytree(tiny_shards, other)
    (other / "shard-2.parquet").unlink()
    classes = shards.load(tiny_shards).classes
    shards.save(dataclasses.replace(shards.index(str(other)), classes=classes))
    with pytest.raises(CheckpointError, match="the data has changed since"):
        worker(tiny_run(f"data.train={other}"))


def test_run_folder_on_s3(tiny_run, s3):
    """Checkpoints, metrics, TensorBoard and the exported model live on S3, and a stopped run goes on from there."""
    from unlearn.data.storage import Storage
    from unlearn.models import weights

    whole, run = tiny_run(), tiny_run(f"run_dir={s3}/run")

    def stop(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker(run, stop)
    worker(run)
    worker(whole)
    there, _ = weights.read(export(run))
    here, _ = weights.read(export(whole))
    assert all(torch.equal(there[n], here[n]) for n in here)
    names = Storage(run.run_dir).files()
    assert "metrics.jsonl" in names and "checkpoints/step-00000004/COMMIT" in names
    assert any(n.startswith("tensorboard/events") for n in names)
