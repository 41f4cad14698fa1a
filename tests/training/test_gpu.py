"""What a GPU alone can show; skipped where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.models import SMALL, build
from support.runs import export, tiny_config, worker

from unlearn import config
from unlearn.data.loader import Loader
from unlearn.errors import TrainingError
from unlearn.methods import base as methods
from unlearn.models import weights
from unlearn.run import resolve
from unlearn.training import loop, metrics
from unlearn.training.kept import Kept

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
COMMON = [
    "training.micro_batch_size=4", "training.steps=4", "training.checkpoint_every=2", "training.lr=1e-4",
    "training.clip=0.05",
]  # fmt: skip
GPU = ["cluster.gpus_per_worker=1"]
SHARDED = [*GPU, "training.engine=deepspeed", "cluster.workers=1"]


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group over NCCL, of this process alone."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    where = tmp_path_factory.mktemp("group") / "meet"
    dist.init_process_group("nccl", init_method=f"file://{where}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def small(tiny_shards, tmp_path):
    """small(shape, *overrides) -> the configuration of a short run of this shape, in a folder of its own each."""
    made = []

    def of(shape: str, *overrides: str):
        model = tmp_path / shape
        if not model.exists():
            weights.write(build(shape), str(model), {})
        made.append(shape)
        run_dir = tmp_path / f"run-{len(made)}"
        return tiny_config(run_dir, tiny_shards, str(model), *COMMON, f"model.family={SMALL[shape][0]}", *overrides)

    return of


def _near(run, plain, half: bool = False) -> None:
    """Both have the same losses, and their weights moved alike; half: one of them computed in bfloat16."""
    for row, other in zip(metrics.read(run.run_dir), metrics.read(plain.run_dir), strict=True):
        for name in ("loss", "retain", "forget"):
            assert row[name] == pytest.approx(other[name], rel=0.05 if half else 2e-3, abs=2e-3 if half else 1e-6), name
    if not half:
        mine, theirs = (load_file(f"{export(r)}/weights.safetensors") for r in (run, plain))
        before = load_file(f"{plain.model.weights}/weights.safetensors")
        moved = max(float((theirs[n].float() - t.float()).abs().max()) for n, t in before.items())
        for name, tensor in theirs.items():
            assert float((mine[name].float() - tensor.float()).square().mean().sqrt()) < 0.05 * moved, name
            assert torch.equal(tensor, before[name]) == torch.equal(mine[name], before[name]), name


@pytest.mark.parametrize("shape", SMALL)
def test_every_family_trains_as_on_the_cpu(small, shape):
    """In float32; the random numbers of the two devices differ, so noise is told apart by its effect alone: retain."""
    here, there = small(shape, *GPU), small(shape)
    for run in (here, there):
        worker(run)
    for row, other in zip(metrics.read(here.run_dir), metrics.read(there.run_dir), strict=True):
        assert row["retain"] == pytest.approx(other["retain"], rel=0.1, abs=1e-3)
    before, after = (load_file(f"{p}/weights.safetensors") for p in (here.model.weights, export(here)))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"encoder.{n}" for n, _ in weights.build(here.model).encoder.named_parameters()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_a_zero_stage_trains_as_plain_torch(group, small, stage, dtype):
    run = small("mae", *SHARDED, f"training.zero_stage={stage}", f"training.dtype={dtype}")
    plain = small("mae", *GPU, f"training.dtype={dtype}")
    for each in (run, plain):
        worker(each)
    _near(run, plain, dtype == "bf16")


@pytest.mark.parametrize(
    "options",
    [["training.offload_optimizer=true"], ["training.activation_checkpointing=true"],
     ["method={name: gradient_projection, alpha: 1.0}"]],
    ids=["offload", "checkpointing", "gradients apart"],
)  # fmt: skip
def test_an_option_trains_as_plain_torch(group, small, options):
    same = options if "method" in options[0] else []
    run, plain = small("mae", *SHARDED, "training.zero_stage=2", *options), small("mae", *GPU, *same)
    for each in (run, plain):
        worker(each)
    _near(run, plain)


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("stage", [None, 2])
def test_stopped_it_ends_with_the_same_bits(group, small, shape, stage):
    engine = [*SHARDED, f"training.zero_stage={stage}"] if stage else GPU
    whole, again = small(shape, *engine), small(shape, *engine)
    worker(whole)
    loop.worker(resolve(again), until=2)
    worker(again)
    first, second = (load_file(f"{export(run)}/weights.safetensors") for run in (whole, again))
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_waits_for_no_device(small, shape, dtype):
    """Plain torch's: DeepSpeed itself asks for the norm of the gradient."""
    settings = small(shape, *GPU, f"training.dtype={dtype}")
    run, device = resolve(settings), torch.device("cuda", 0)
    student, method = weights.build(settings.model, settings.seed), methods.create(settings.method)
    first_stage = student.take_first_stage(device)
    if first_stage is not None:
        student.stock_noise(first_stage, settings.seed)
    engine = loop.make_engine(settings, method, student, first_stage, device)
    loader = Loader(settings, run.sets, student.grid, student.options.image_size)
    batches = [loader.batch(number).pin() for number in range(2)]
    engine.step(batches, 1e-4)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        engine.step(batches, 1e-4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_targets_that_are_kept_change_no_bit(small):
    kept, runs = Kept(targets=True), [small("mae", *GPU, f"method.alpha={alpha}") for alpha in (0.5, 0.1, 0.1)]
    for run in runs[:2]:
        loop.worker(resolve(run), kept=kept)
    worker(runs[2])
    with_kept, without = (load_file(f"{export(run)}/weights.safetensors") for run in runs[1:])
    assert all(torch.equal(with_kept[name], without[name]) for name in without)


def test_what_does_not_fit_is_told(small):
    wide = "{image_size: 32, patch_size: 2, width: 512, depth: 24, heads: 8, decoder_width: 8, decoder_heads: 2}"
    settings = small("mae", *GPU, "model={family: mae, options: " + wide + "}", "training.micro_batch_size=8")
    torch.cuda.empty_cache()
    for left, what in ((2**29, "the model, with its teacher,"), (2**30, "a micro-batch of 8 rows")):
        full = torch.empty(torch.cuda.mem_get_info()[0] - left, dtype=torch.uint8, device="cuda")
        with pytest.raises(TrainingError, match=f"{what} does not fit on the device"):
            worker(settings)
        del full
        torch.cuda.empty_cache()


def test_what_is_not_finite_is_told_before_the_update(small):
    """In a process of its own, since an assertion that fails on the device ends all use of it."""
    settings = small("mae", *GPU, "training.lr=1e30", "training.clip=0", "training.log_every=1")
    path = Path(settings.run_dir).with_suffix(".yaml")
    path.write_text(config.dump(settings))
    code = (
        "import sys; from unlearn import config; from unlearn.run import resolve; from unlearn.training import loop\n"
        "from unlearn.errors import TrainingError\n"
        "try: loop.worker(resolve(config.load(sys.argv[1])))\n"
        "except TrainingError as e: print('told:', e)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=600)
    assert "is not finite; stopped before the update" in done.stdout, done.stdout + done.stderr[-2000:]
