"""Every method trains in some ZeRO stage as in plain torch, and resumes to the bit; each stage has methods of each
kind."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import export, tiny_config, worker
from support.workers import together

from jobs import train
from unlearn.errors import ConfigError
from unlearn.training import metrics

SHARDED = ["training.engine=deepspeed", "cluster.workers=2"]
# AdamW's first steps are lr x the gradient's sign, so gradients that are nearly zero would show as differences.
COMMON = ["training.micro_batch_size=2", "training.checkpoint_every=3", "training.lr=1e-4", "training.steps=6"]
SALIENT = ["method.saliency=0.3", "training.weight_decay=0"]
# (stage, what is other than in COMMON): two micro-batches a worker and step.
QUICK = {
    "max_loss": (3, ["method.name=max_loss"]),
    "retain_label": (2, ["method.name=retain_label"]),
    "random_encoder": (0, ["method.name=random_encoder"]),
    # the outputs differ enough behind its fourth step
    "decoupling": (3, ["method.name=decoupling", "method.climb=encoder", "method.threshold=8e-5"]),
    "gradient_projection": (1, ["method.name=gradient_projection"]),
    # the original weights come back behind steps 2 and 4; a checkpoint lies between
    "epsilon_constrained": (2, ["method.name=epsilon_constrained", "method.boundary=0.34"]),
    "saliency 3": (3, SALIENT),
}
FURTHER = {
    "noisy_label": (1, ["method.name=noisy_label"]),
    "blur": (2, ["method.target=blur"]),
    "epsilon_constrained bf16": (1, ["method.name=epsilon_constrained", "method.boundary=0.34", "training.dtype=bf16"]),
    **{f"saliency {stage}": (stage, SALIENT) for stage in range(3)},
    "saliency apart": (2, [*SALIENT, "method.name=gradient_projection"]),
}
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in FURTHER)]


@pytest.fixture(scope="module")
def trained(tiny_shards, tiny_model, tmp_path_factory):
    """trained(case) -> (its run, that on plain torch, its run stopped behind step 3 and resumed)."""
    made: dict[str, tuple] = {}

    def of(case: str) -> tuple:
        if case not in made:
            made.update(_trained(QUICK if case in QUICK else FURTHER, tiny_shards, tiny_model, tmp_path_factory))
        return made[case]

    return of


def _trained(cases, tiny_shards, tiny_model, tmp_path_factory) -> dict[str, tuple]:
    folder, made, plain = tmp_path_factory.mktemp("methods"), {}, {}
    for number, (name, (stage, options)) in enumerate(cases.items()):
        key = tuple(options)
        if key not in plain:
            plain[key] = tiny_config(folder / f"plain-{number}", tiny_shards, tiny_model, *COMMON, *options)
            worker(plain[key])
        sharded = [*COMMON, *SHARDED, f"training.zero_stage={stage}", *options]
        run = tiny_config(folder / f"case-{number}", tiny_shards, tiny_model, *sharded)
        made[name] = run, plain[key], run.model_copy(update={"run_dir": f"{run.run_dir}-stopped"})
    together([run for run, _, _ in made.values()], workers=2)
    for run, _, stopped in made.values():
        shutil.copytree(run.run_dir, stopped.run_dir)
        shutil.rmtree(Path(stopped.run_dir, "checkpoints", "step-00000006"))
    together([stopped for _, _, stopped in made.values()], workers=2)
    return made


def weights_of(run) -> dict[str, torch.Tensor]:
    return load_file(f"{export(run)}/weights.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_plain_torch_and_resumes_to_the_bit(trained, case):
    run, plain, stopped = trained(case)
    half = run.training.dtype == "bf16"
    rows, expected = metrics.read(run.run_dir), metrics.read(plain.run_dir)
    assert len(rows) == len(expected) == 6
    for row, other in zip(rows, expected, strict=True):
        for name in other.keys() - {"images_per_s", "flop_per_s", "peak_memory_gib", "workers", "mfu"}:
            near = {"rel": 0.1, "abs": 2e-3} if half else {"rel": 1e-3, "abs": 1e-6}
            assert row[name] == pytest.approx(other[name], **near), (name, row["step"])
    before = load_file(f"{run.model.weights}/weights.safetensors")
    mine, theirs = weights_of(run), weights_of(plain)
    moved = max(float((theirs[n].float() - t.float()).abs().max()) for n, t in before.items())
    assert moved > 2e-5
    if not half:
        for name, tensor in theirs.items():
            assert float((mine[name].float() - tensor.float()).square().mean().sqrt()) < 0.03 * moved, name
    assert (Path(export(run), "weights.safetensors").read_bytes()) == Path(
        export(stopped), "weights.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("case", [case for case in CASES if "saliency" in str(case)])
def test_only_salient_weights_move(trained, case):
    run, plain, _ = trained(case)
    before = load_file(f"{run.model.weights}/weights.safetensors")
    moved = {}
    for one in (run, plain):
        after = weights_of(one)
        moved[one.run_dir] = torch.cat(
            [(after[n] != t).flatten() for n, t in before.items() if n.startswith("encoder.")]
        )
        share = float(moved[one.run_dir].double().mean())
        assert 0.29 < share <= 0.301
    mine, theirs = moved.values()
    assert int((mine != theirs).sum()) <= 0.002 * len(mine)  # gradients next to the limit that were rounded


def test_epsilon_constrained_starts_anew_twice(trained):
    """Behind steps 2 and 4 it computes what it computed at first: the loss of the original weights."""
    _, plain, _ = trained("epsilon_constrained")
    rows = metrics.read(plain.run_dir)
    assert [row["retain"] == 0 for row in rows] == [True, False] * 3
    assert [row["lr"] for row in rows[:2]] == [row["lr"] for row in rows[2:4]]


def test_decoupling_turns_round(trained):
    rows = metrics.read(trained("decoupling")[0].run_dir)
    signs = [row["loss"] < 0 for row in rows]
    assert signs[0] and not signs[-1] and signs == sorted(signs, reverse=True)


def test_decoupling_that_never_turns_round_says_so(tiny_run, tmp_path, caplog):
    for threshold, told in ((1e9, 1), (1e-9, 0)):
        caplog.clear()
        own = [f"run_dir={tmp_path / str(told)}", "training.steps=3"]
        run = tiny_run("method.name=decoupling", f"method.threshold={threshold}", *own)
        train.train(train.prepare(run))
        assert sum("the run ended while it climbed" in r.message for r in caplog.records) == told


def test_a_method_without_a_teacher_starts_from_an_original_and_is_measured(tiny_run):
    run = train.check(tiny_run("method.name=max_loss"))
    assert run.measured.keys() == {"forget", "retain"}
    with pytest.raises(ConfigError, match="model.weights is missing: max_loss starts from a trained model"):
        train.check(tiny_run("method.name=max_loss", "model.weights=null"))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["method.name=epsilon_constrained", "training.zero_stage=3"],
            "zero_stage 3: epsilon_constrained needs the gradient of each",
        ),
        (["method.name=gradient_projection", "training.zero_stage=3"], "set zero_stage 2 or lower"),
        (["method.saliency=0.5"], "training.weight_decay 0.05 would move the weights that are to stay; set it to 0"),
        (["method.name=epsilon_constrained", "training.steps=2"], "a run of 2 steps has no room"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(tiny_run, options, message):
    settings = tiny_run(*SHARDED, "training.micro_batch_size=2", *options)
    with pytest.raises(ConfigError, match=message):
        train.check(settings)
    assert not Path(settings.run_dir).exists()
