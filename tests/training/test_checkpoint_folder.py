"""The folder of checkpoints: what is kept, what is damaged or strange in it, and how it is read."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from support.runs import export, worker

from unlearn.data import shards
from unlearn.data.storage import Storage
from unlearn.errors import CheckpointError
from unlearn.training import checkpoint, ranks
from unlearn.training.checkpoint import Checkpoints
from unlearn.training.fragments import Fragment


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


STRANGE = (
    ".DS_Store", "notes.txt", "step-abc/COMMIT", "step-7/COMMIT", "step-000000009/COMMIT", "old/step-00000002/COMMIT",
    "step-00000009/sub/COMMIT", "step-00000001/notes.txt", "step-00000001.bak/COMMIT",
)  # fmt: skip


def test_what_is_no_checkpoint_is_left_alone(tiny_run, place):
    run = tiny_run(f"run_dir={place}", "training.keep_checkpoints=1")
    for name in STRANGE:
        Storage(place).write(f"checkpoints/{name}", b"mine")
    Storage(place).write("checkpoints/step-00000001/rank-00000-of-00001.safetensors", b"never committed")
    assert Checkpoints(place, 1).steps() == []
    worker(run)
    assert Checkpoints(place, 1).steps() == [4]
    names = {name.removeprefix("checkpoints/") for name in Storage(place).files("checkpoints")}
    assert names == {*STRANGE, "step-00000004/COMMIT", "step-00000004/rank-00000-of-00001.safetensors"}
    assert all(Storage(place).read(f"checkpoints/{name}") == b"mine" for name in STRANGE)
    worker(run)  # goes on from the one that there is, and has nothing to do


def test_a_folder_that_a_stranger_shares_loses_what_is_ours(tiny_run):
    run = tiny_run("training.keep_checkpoints=1", "training.checkpoint_every=1")
    folder = Path(run.run_dir, "checkpoints/step-00000001")

    def leave(row):
        if row["step"] == 2:
            (folder / "notes.txt").write_text("mine")

    worker(run, leave)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"] and Checkpoints(run.run_dir, 1).steps() == [4]


@pytest.mark.parametrize("change, message", [
    (lambda tree: tree["state"].pop("step"), "step missing or unknown"),
    (lambda tree: tree["state"].update(epoch=3), "epoch missing or unknown"),
    (lambda tree: tree.update(later=1), "later missing or unknown"),
    (lambda tree: tree["state"].update(step=2), "it is of step 2"),
    (lambda tree: tree["state"].update(step="4"), "it is of step 4"),
    (lambda tree: tree["state"].update(data=3), "is damaged"),
    (lambda tree: tree.update(state=[1]), "is damaged"),
    (lambda tree: tree.update(files=["rank-00000-of-00001.safetensors"]), "is damaged"),
    (lambda tree: tree["files"].update({"../../secret": {"bytes": 1, "sha256": ""}}), "secret missing or unknown"),
    (lambda tree: tree["files"].update({"rank-00001-of-00002.safetensors": {"bytes": 1, "sha256": ""}}),
        "rank-00001-of-00002.safetensors is missing"),
])  # fmt: skip
def test_a_commit_that_cannot_be_used_is_told(tiny_run, change, message):
    run = tiny_run()
    worker(run)
    commit = Path(run.run_dir, "checkpoints/step-00000004/COMMIT")
    tree = json.loads(commit.read_text())
    change(tree)
    commit.write_text(json.dumps(tree))
    for call in (worker, export):
        with pytest.raises(CheckpointError, match=f"step-00000004.*{message}.*delete that folder"):
            call(run)


def test_resuming_holds_no_second_copy_of_the_checkpoint(tmp_path):
    """The weights go from the mapped file into the model; whole tensors are never put together."""
    from support.memory import peak
    from support.models import TINY

    from unlearn import config
    from unlearn.models import weights

    model = weights.build(config.Model(options=TINY | {"width": 512, "depth": 4}))
    trained = [(n, p) for n, p in model.named_parameters() if n.startswith("encoder.")]
    optimizer = torch.optim.AdamW([p for _, p in trained])
    for _, p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    halves = [
        Fragment(n, start, count, p, start, optimizer)
        for n, p in trained for start, count in ((0, p.numel() // 2), (p.numel() // 2, p.numel() - p.numel() // 2))
    ]  # fmt: skip
    state = checkpoint.TrainerState(1, 8, "", {}, 1)
    checkpoints = Checkpoints(str(tmp_path), 2)
    _, saving = peak(lambda: checkpoints.save(halves, state, 0, ranks.gather))
    size = sum(p.numel() * 4 for _, p in trained)

    def resume():
        with checkpoints.open(1) as saved:
            saved.weights(model)
            saved.restore(halves, 1)

    _, resuming = peak(resume)
    assert saving < 0.3 * size and resuming < 0.3 * size


def test_a_method_without_state_writes_none(tiny_run):
    run = tiny_run()
    worker(run)
    assert not list(Path(run.run_dir).rglob("method.safetensors"))
