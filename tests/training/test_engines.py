"""Every engine, ZeRO stage and setting trains as plain torch does; the decoder keeps its bytes."""

import pytest
import torch
from safetensors.torch import load_file
from support.runs import export, tiny_config, worker
from support.workers import in_group, together

from unlearn.data.loader import Loader
from unlearn.methods import base as methods
from unlearn.models import weights
from unlearn.run import Run, resolve
from unlearn.training import loop, metrics

STAGES = [f"training.zero_stage={stage}" for stage in range(4)]
OPTIONS = ["training.activation_checkpointing=true", "training.offload_optimizer=true"]
# Parameters large enough that ZeRO-3 lets go of them between uses.
WIDE = (
    "model={family: mae, options: {image_size: 32, patch_size: 8, width: 320, depth: 2, heads: 4, decoder_width: "
    "8, decoder_heads: 2}}"
)
# Two micro-batches a worker and step, clipped at every step, a learning rate that changes.
COMMON = ["training.micro_batch_size=2", "training.clip=0.05", "training.warmup_steps=2", "training.steps=5"]
CASES = [
    *[(stage, f"training.dtype={dtype}") for stage in STAGES for dtype in ("fp32", "bf16")],
    *[(stage, option) for stage in STAGES[1:] for option in OPTIONS],
    (STAGES[1], OPTIONS[1], "training.dtype=bf16"), (STAGES[3], OPTIONS[1], "training.dtype=bf16"),
    (STAGES[3], WIDE), (STAGES[3], WIDE, OPTIONS[0]),
    (STAGES[2], "method.name=pretrain"), (STAGES[3], "method.name=pretrain"),
]  # fmt: skip
SHARDED = ["training.engine=deepspeed", "cluster.workers=2"]


@pytest.fixture(scope="module")
def trained(tiny_shards, tiny_model, tmp_path_factory):
    """{case: (its run, the same run on plain torch)}, all of them trained."""
    folder, plain, cases = tmp_path_factory.mktemp("engines"), {}, {}
    for number, case in enumerate(CASES):
        told = tuple(o for o in case if "dtype" in o or "method" in o or o == WIDE)
        if told not in plain:
            plain[told] = tiny_config(folder / f"plain-{len(plain)}", tiny_shards, tiny_model, *COMMON, *told)
            worker(plain[told])
        run = tiny_config(folder / f"case-{number}", tiny_shards, tiny_model, *COMMON, *SHARDED, *case)
        cases[case] = (run, plain[told])
    together([run for run, _ in cases.values()], workers=2)
    return cases


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(o.partition(".")[2] for o in case))
def test_case_trains_as_plain_torch(trained, case):
    run, plain = trained[case]
    half = run.training.dtype == "bf16"
    rows, expected = metrics.read(run.run_dir), metrics.read(plain.run_dir)
    assert len(rows) == len(expected) == 5
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "retain", "grad_norm", "lr"):
            # bf16 keeps 8 bits: what is small beside the loss is only as exact as the loss
            near = {"rel": 0.1 if name == "grad_norm" else 0.02, "abs": 1e-3} if half else {"rel": 1e-4}
            assert row[name] == pytest.approx(other[name], **near), name
    if not half:
        mine, theirs = (load_file(f"{export(r)}/weights.safetensors") for r in (run, plain))
        assert all(torch.allclose(mine[n], theirs[n], atol=2e-5) for n in theirs)


def test_only_the_encoder_moves(trained):
    for case, (run, _) in trained.items():
        if run.method.name == "encoder_l2":
            before = weights.build(run.model, run.seed).state_dict()
            after = load_file(f"{export(run)}/weights.safetensors")
            for name, tensor in after.items():
                same = torch.equal(tensor, before[name])
                assert same == (name.startswith("decoder.") or name.endswith("pos_embed")), (case, name)


def test_gradient_is_clipped(trained, tiny_shards, tiny_model, tmp_path):
    """The cases above would agree without clipping too: the plain engine must differ when it does not clip."""
    run, plain = trained[CASES[0]]
    loose = tiny_config(tmp_path / "loose", tiny_shards, tiny_model, *COMMON, "training.clip=0")
    worker(loose)
    tight, free = (load_file(f"{export(r)}/weights.safetensors") for r in (plain, loose))
    assert min(row["grad_norm"] for row in metrics.read(plain.run_dir)) > 0.05
    assert not all(torch.allclose(tight[n], free[n], atol=2e-5) for n in free)


def _a_step_that_must_not_be(rank: int, runs: list[Run]) -> None:
    for run in runs:
        student = weights.build(run.settings.model, run.settings.seed)
        engine = loop.make_engine(run.settings, methods.create(run.settings.method), student, None, torch.device("cpu"))
        loader = Loader(run.settings, run.sets, student.grid, student.options.image_size)
        before = [f.master().clone() for f in engine.fragments()], [p.detach().clone() for p in student.parameters()]
        with pytest.raises(RuntimeError, match="the gradient norm is not finite"):
            engine.step((loader.batch(n) for n in range(run.settings.accumulation)), 1e-2)
        after = [f.master() for f in engine.fragments()], list(student.parameters())
        for a, b in zip(before, after, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), run.settings.training


def test_no_engine_takes_a_step_whose_gradient_is_not_finite(toys, tiny_shards, tiny_model, tmp_path):
    """Its loss is. The weights are afterwards what they were, also without ZeRO, where DeepSpeed itself does not
    look."""
    options = [f"training.dtype={dtype}" for dtype in ("fp32", "bf16")]
    cases = [(*SHARDED, stage, option) for stage in STAGES for option in options]
    runs = [
        resolve(tiny_config(tmp_path / "run", tiny_shards, tiny_model, *COMMON, "method.name=toy_endless", *case))
        for case in cases
    ]
    in_group(_a_step_that_must_not_be, 2, runs)
    plain = tiny_config(tmp_path / "run", tiny_shards, tiny_model, *COMMON, "method.name=toy_endless")
    _a_step_that_must_not_be(0, [resolve(plain)])
