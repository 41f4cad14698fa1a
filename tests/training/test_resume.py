"""Stopped anywhere, by anything, and resumed: the same weights to the bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.runs import export, tiny_config, worker
from support.workers import in_group, together

from unlearn.data.storage import Storage
from unlearn.errors import CheckpointError, StorageError
from unlearn.training import checkpoint, metrics, ranks
from unlearn.training.checkpoint import Checkpoints
from unlearn.training.fragments import OPTIMIZER_STATE, Fragment

STEPS = 5
SHARDED = [
    "training.engine=deepspeed",
    "training.micro_batch_size=2",
    f"training.steps={STEPS}",
    "training.checkpoint_every=2",
]


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


# The step, where in it, and the ZeRO stage: each place for one stage, the middle of a save for both.
KILLS = [
    (1, "report", 2), (3, "report", 3), (4, "written", 2), (4, "written", 3), (4, "committed", 2),
    (2, "written", 2),  # begins anew in a process that has trained with stage 3 before
]  # fmt: skip
FURTHER = [(2, "report", 2), (4, "report", 2), (4, "committed", 3)]


@pytest.fixture(scope="module")
def resumed(whole, tmp_path_factory):
    """resumed(step, where, stage) -> a run that was killed there and went on. Each is killed in processes of its own;
    those that go on share theirs, which saves starting them."""
    made = {}

    def of(*kill):
        if kill not in made:
            made.update(_resumed(KILLS if kill in KILLS else FURTHER, whole, tmp_path_factory))
        return made[kill]

    return of


def _resumed(kills, whole, tmp_path_factory) -> dict:
    runs = {}
    for step, where, stage in kills:
        runs[step, where, stage] = run = whole[stage].model_copy(
            update={"run_dir": str(tmp_path_factory.mktemp("killed") / "run")}
        )
        with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
            together([run], 2, kill_at=step, kill_in=where)
        assert Checkpoints(run.run_dir, 2).steps() == [s for s in (2, 4) if s < step or where == "committed"]
    together(list(runs.values()), 2)
    return runs


@pytest.mark.parametrize(
    ("step", "where", "stage"), [*KILLS, *(pytest.param(*kill, marks=pytest.mark.slow) for kill in FURTHER)]
)
def test_killed_at_any_step_and_resumed_is_the_same_run(whole, resumed, stage, step, where):
    run = resumed(step, where, stage)
    assert not list(Path(run.run_dir).rglob("*.part"))
    assert weights_of(run) == weights_of(whole[stage])
    assert [row["step"] for row in metrics.read(run.run_dir)] == [*range(1, STEPS + 1)]


def test_the_comparison_can_fail(whole, tmp_path):
    """Control: a run that resumes without the optimizer's state, or one with another seed, ends elsewhere."""
    forgets, other = (
        whole[2].model_copy(update={"run_dir": str(tmp_path / name), **change})
        for name, change in (("forgets", {}), ("seed", {"seed": 4}))
    )
    shutil.copytree(whole[2].run_dir, forgets.run_dir)
    shutil.rmtree(Path(forgets.run_dir, "checkpoints", f"step-{STEPS:08d}"))
    for file in Path(forgets.run_dir, "checkpoints").rglob("*.safetensors"):
        _zero_moments(file)
    together([forgets, other], 2)
    assert weights_of(forgets) != weights_of(whole[2]) != weights_of(other)


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
            options = [
                "training.engine=deepspeed",
                "training.micro_batch_size=2",
                f"cluster.workers={workers}",
                "training.steps=6",
            ]
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


def test_run_folder_on_s3(tiny_run, s3):
    """Checkpoints, metrics, TensorBoard and the exported model live on S3, and a stopped run goes on from there."""
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


def _ranks_agree(rank: int, run_dir: str) -> None:
    checkpoints = Checkpoints(run_dir, 2)
    if rank == 1:  # another listing than that of rank 0: a storage that is late, a folder deleted meanwhile
        Checkpoints.steps = lambda self: [2]
        Checkpoints._commit = None
    assert checkpoints.newest() == STEPS
    read, checked = [], checkpoint._whole
    checkpoint._whole = lambda path, about: read.append(path.name) or checked(path, about)
    with checkpoints.open(STEPS) as saved:
        assert saved.names()
    assert ranks.on_this_machine() == (rank, 2) and len(read) == 1
    assert sorted(name for names in ranks.gather(read) for name in names) == [
        f"rank-0000{r}-of-00002.safetensors" for r in (0, 1)
    ]

    def fail():
        raise StorageError("out of reach")

    with pytest.raises(StorageError, match="out of reach"):
        ranks.from_first(fail)
    ranks.gather(None)
    file = Path(run_dir, "checkpoints", f"step-{STEPS:08d}", "rank-00001-of-00002.safetensors")
    if rank == 0:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    ranks.gather(None)
    with pytest.raises(CheckpointError, match="rank-00001-of-00002.safetensors is damaged"), checkpoints.open(STEPS):
        pass


def test_all_ranks_take_what_rank_0_chose_and_check_a_file_once_a_machine(whole, tmp_path):
    shutil.copytree(whole[2].run_dir, tmp_path / "run")
    in_group(_ranks_agree, 2, str(tmp_path / "run"))


class Recorder:
    """A file of tensors that notes how many elements are read of it."""

    def __init__(self, file, read: dict[str, int]):
        self.file, self.read = file, read

    def get_slice(self, key):
        held, kind = self.file.get_slice(key), key.partition("/")[0]

        class Slice:
            def __getitem__(_, part):
                self.read[kind] = self.read.get(kind, 0) + part.stop - part.start
                return held[part]

        return Slice()


def test_a_rank_reads_its_pieces_alone(whole):
    """Of the optimizer's state nothing but the elements of its fragments; these may be cut as another number of workers
    has them."""
    read = {}
    with Checkpoints(whole[2].run_dir, 2).open(STEPS) as saved:
        saved._pieces = {
            k: [(at, n, Recorder(f, read), key) for at, n, f, key in pieces] for k, pieces in saved._pieces.items()
        }
        sizes = {name: saved.count("weights", name) for name in saved.names()}
        total = sum(sizes.values())
        flats = {name: torch.nn.Parameter(torch.zeros(n)) for name, n in sizes.items()}
        optimizer = torch.optim.AdamW(flats.values(), fused=False)
        for p in flats.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        cuts = [(name, n // 3, n - n // 3 - n // 4) for name, n in sizes.items()]
        mine = [Fragment(name, start, count, flats[name], start, optimizer) for name, start, count in cuts]
        saved.restore(mine, STEPS)
        assert (
            read == {kind: sum(count for *_, count in cuts) for kind in ("weights", *OPTIMIZER_STATE)}
            and read["exp_avg"] < total / 2
        )
        for name, start, count in cuts:
            for kind in ("weights", *OPTIMIZER_STATE):
                all_of_it = torch.empty(sizes[name])
                saved.read(all_of_it, kind, name)
                found = flats[name].detach() if kind == "weights" else optimizer.state[flats[name]][kind]
                assert torch.equal(found[start : start + count], all_of_it[start : start + count])
        with pytest.raises(CheckpointError, match="exp_avg of .* ends before element"):
            saved.read(torch.empty(5), "exp_avg", saved.names()[0], sizes[saved.names()[0]] - 4)
        with pytest.raises(CheckpointError, match="has a gap at element 0"):
            files = {id(f.file): f.file for pieces in saved._pieces.values() for _, _, f, _ in pieces}
            checkpoint.Saved([list(files.values())[1]], {}, "here")


def test_what_a_method_remembers_is_in_the_checkpoint(toys, tiny_run, tiny_shards, tiny_model, tmp_path, monkeypatch):
    """Resumed on plain torch and on two workers, with another number of workers too, it goes on as if it had not
    stopped."""
    options = [
        "method.name=toy_remembering",
        "training.steps=6",
        "training.schedule=constant",
        "training.micro_batch_size=4",
    ]
    whole = tiny_run(*options)
    worker(whole)
    stopped = whole.model_copy(update={"run_dir": str(tmp_path / "stopped")})
    shutil.copytree(whole.run_dir, stopped.run_dir)
    shutil.rmtree(Path(stopped.run_dir, "checkpoints/step-00000006"))
    folder = Path(stopped.run_dir, "checkpoints/step-00000004")
    with Checkpoints(stopped.run_dir, 2).open(4) as saved:
        assert int(saved.method["steps"]) == 4 and saved.method["size"].min() > 0  # the dry-run step is not among them
    assert "method.safetensors" in json.loads((folder / "COMMIT").read_text())["files"]
    worker(stopped)
    assert weights_of(stopped) == weights_of(whole)

    sharded = [*options, "training.engine=deepspeed", "cluster.workers=2", "training.zero_stage=1"]
    pair, again = (tiny_config(tmp_path / name, tiny_shards, tiny_model, *sharded) for name in ("pair", "again"))
    together([pair], 2)
    shutil.copytree(pair.run_dir, again.run_dir)
    shutil.rmtree(Path(again.run_dir, "checkpoints/step-00000006"))
    together([again], 2)
    assert weights_of(again) == weights_of(pair)

    # Control: with a method that forgets it ends elsewhere, and a file that was changed is found.
    forgets = whole.model_copy(update={"run_dir": str(tmp_path / "forgets")})
    shutil.copytree(whole.run_dir, forgets.run_dir)
    shutil.rmtree(Path(forgets.run_dir, "checkpoints/step-00000006"))
    monkeypatch.setattr("support.methods.Remembering.load_state_dict", lambda self, state: None)
    worker(forgets)
    assert weights_of(forgets) != weights_of(whole)
    (folder / "method.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="method.safetensors is damaged"), Checkpoints(stopped.run_dir, 2).open(4):
        pass
