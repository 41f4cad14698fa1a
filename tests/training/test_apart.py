"""Methods that are given the gradient of each term train in every engine as in plain torch, and as float64 has it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.methods import Projected
from support.models import TINY, batch_for
from support.runs import export, tiny_config, worker
from support.workers import together

from jobs import train
from unlearn import config
from unlearn.errors import ConfigError
from unlearn.methods import base as methods
from unlearn.models import weights
from unlearn.training import metrics
from unlearn.training.apart import TermGradients, dot
from unlearn.training.engine import Objective, TorchEngine, check

SHARDED = ["training.engine=deepspeed", "cluster.workers=2"]
# Two micro-batches a worker and step, clipped at every step, a learning rate that changes.
COMMON = [
    "training.micro_batch_size=2",
    "training.clip=0.05",
    "training.warmup_steps=2",
    "training.steps=4",
    "method.alpha=0.7",
]
# Three micro-batches of two workers: one of them computes one that counts for nothing.
UNEVEN = ["training.batch_size=12", "training.micro_batch_size=4"]
# Stage, method and type of the weights by pairs: each of one with each of the others.
CASES = [
    *[(f"training.zero_stage={stage}", f"method.name={name}", f"training.dtype={dtype}") for stage, name, dtype in (
        (0, "toy_sum", "fp32"), (0, "toy_projected", "bf16"), (1, "toy_sum", "bf16"), (1, "toy_projected", "fp32"),
        (2, "toy_sum", "fp32"), (2, "toy_projected", "bf16"),
    )],
    # DeepSpeed releases have given wrong gradients, and no error, where a module is used twice in one forward pass.
    *[(f"training.zero_stage={stage}", "method.name=toy_twice", f"training.dtype={dtype}")
      for stage, dtype in enumerate(("fp32", "bf16", "bf16", "fp32"))],
    ("training.zero_stage=3", "method.name=toy_twice", "training.dtype=bf16"),
    *[(f"training.zero_stage={stage}", "method.name=toy_sum", *UNEVEN) for stage in (0, 1)],
    ("training.zero_stage=2", "method.name=toy_projected", "training.activation_checkpointing=true"),
    ("training.zero_stage=1", "method.name=toy_projected", "training.offload_optimizer=true"),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(toys, tiny_shards, tiny_model, tmp_path_factory):
    """{case: (its run, the run on plain torch that it must equal)}: for the weighted sum that of the usual path."""
    folder, plain, cases = tmp_path_factory.mktemp("apart"), {}, {}
    for number, case in enumerate(CASES):
        same = tuple(
            o.replace("toy_sum", "encoder_l2").replace("toy_twice", "encoder_l2")
            for o in case
            if o.startswith(("method.", "training.dtype", *(u[:18] for u in UNEVEN)))
        )
        if same not in plain:
            plain[same] = tiny_config(folder / f"plain-{len(plain)}", tiny_shards, tiny_model, *COMMON, *same)
            worker(plain[same])
        workers = ["cluster.workers=3"] if UNEVEN[0] in case else []
        cases[case] = (
            tiny_config(folder / f"case-{number}", tiny_shards, tiny_model, *COMMON, *SHARDED, *workers, *case),
            plain[same],
        )
    together([run for run, _ in cases.values()], workers=2)
    return cases


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(o.partition(".")[2] for o in case))
def test_case_trains_as_plain_torch(trained, case):
    same(*trained[case])


def same(run: config.RunConfig, plain: config.RunConfig) -> None:
    half = run.training.dtype == "bf16"
    rows, expected = metrics.read(run.run_dir), metrics.read(plain.run_dir)
    assert len(rows) == len(expected) == 4
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "retain", "forget", "grad_norm", "lr"):
            near = {"rel": 0.1 if name == "grad_norm" else 0.02, "abs": 1e-3} if half else {"rel": 1e-4}
            assert row[name] == pytest.approx(other[name], **near), name
    if not half:
        mine, theirs = (load_file(f"{export(r)}/weights.safetensors") for r in (run, plain))
        # The gradient of a key's bias is 0 but for rounding, and Adam makes a step of that.
        assert all(torch.allclose(mine[n], theirs[n], atol=5e-5) for n in theirs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_on_plain_torch_too_the_sum_is_the_usual_path(trained, tiny_shards, tiny_model, tmp_path, dtype):
    plain = next(
        p
        for run, p in trained.values()
        if p.method.name == "encoder_l2" and p.training.dtype == dtype and p.training.batch_size == 8
    )
    apart = tiny_config(
        tmp_path / "apart", tiny_shards, tiny_model, *COMMON, "method.name=toy_sum", f"training.dtype={dtype}"
    )
    worker(apart)
    same(apart, plain)


def test_the_comparison_can_fail(trained):
    """Control: the projected gradient is another than the sum."""
    rows = {
        run.method.name: metrics.read(run.run_dir)[0]["grad_norm"]
        for run, _ in trained.values()
        if run.training.dtype == "fp32"
    }
    assert rows["toy_projected"] != pytest.approx(rows["toy_sum"], rel=1e-2)


def test_what_is_stepped_with_is_what_float64_has(toys):
    """A projection of two micro-batches' gradients, of which one counts more, computed anew in float64."""
    method = Projected(Projected.Options(name="toy_projected"))
    student, teacher = (weights.build(config.Model(options=TINY), seed) for seed in (1, 2))
    batches = [
        dataclasses.replace(batch_for(student), seed=seed, weight=weight) for seed, weight in ((5, 1.5), (6, 0.5))
    ]
    settings = config.Training(engine="torch", steps=1, clip=0)
    for model in (student, teacher):
        model.drop_decoder()
    # before the engine moves them
    doubles = [weights.build(config.Model(options=TINY), seed).double() for seed in (1, 2)]
    engine = TorchEngine(Objective(student, method, teacher), method.trainable(student), settings, torch.device("cpu"))
    taken = []
    engine.optimizer.register_step_pre_hook(
        lambda *_: taken.extend(p.grad.clone() for p in student.encoder.parameters())
    )
    engine.step(batches, 1e-3)

    trained, sums = list(doubles[0].encoder.parameters()), {}
    for batch in batches:
        noise = torch.randn(batch.images[batch.retain :].shape, generator=torch.Generator().manual_seed(batch.seed))
        with torch.no_grad():
            routed = torch.cat([batch.images[: batch.retain], noise]).double()
            target = doubles[1].encode(routed, batch.view, batch.seed)
        found = doubles[0].encode(batch.images.double(), batch.view, batch.seed)
        for name, rows in (("retain", slice(0, batch.retain)), ("forget", slice(batch.retain, None))):
            loss = ((found - target)[rows] ** 2).mean() * batch.weight / 2
            gradient = np.concatenate(
                [g.flatten().numpy() for g in torch.autograd.grad(loss, trained, retain_graph=True)]
            )
            sums[name] = sums.get(name, 0) + gradient
    retain, forget = sums["retain"], sums["forget"]
    expected = retain + forget - retain * (forget @ retain) / (retain @ retain)
    found = torch.cat([g.flatten() for g in taken]).numpy()
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.abs(retain + forget - expected).max() > 1e-2 * np.abs(expected).max()  # the projection is no small thing


def test_a_term_that_no_parameter_enters_has_no_gradient():
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    gradients = TermGradients([p, q], 2)
    gradients.add({"one": (2 * p).sum(), "other": torch.zeros(()), "both": (p * q).sum()})

    class Method:
        def combine(self, found, dot):
            assert float(dot(found["one"], found["both"])) == 2 * (1 * 0.5) and not any(g.any() for g in found["other"])
            return [a + b for a, b in zip(found["one"], found["both"], strict=True)]

    combined = gradients.combined(Method())
    assert torch.equal(combined[0], torch.full((2,), 1.5)) and torch.equal(combined[1], torch.full((2,), 0.5))
    assert float(dot(combined, combined)) == 2 * (1.5**2 + 0.5**2)


def test_zero_3_is_refused_before_anything_starts(toys, tiny_run):
    settings = tiny_run("method.name=toy_sum", *SHARDED, "training.zero_stage=3")
    with pytest.raises(
        ConfigError, match="training.zero_stage 3: toy_sum needs the gradient of each term .*set zero_stage 2 or lower"
    ):
        train.check(settings)
    check(settings.training.model_copy(update={"zero_stage": 2}), methods.create(settings.method))
    check(settings.training, methods.create(tiny_run().method))
    assert not Path(settings.run_dir).exists()
