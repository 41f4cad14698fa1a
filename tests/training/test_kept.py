"""What a process keeps from run to run, and a run that is trained in legs."""

from pathlib import Path

import pytest
import torch

from unlearn.run import resolve
from unlearn.training.kept import Kept
from unlearn.training.loop import worker
from unlearn.training.targets import RUNS, Targets


def weights_of(run) -> list[bytes]:
    return [p.read_bytes() for p in Path(run.run_dir, "checkpoints/step-00000004").glob("*.safetensors")]


def test_neither_what_is_kept_nor_legs_change_a_weight(tiny_run, tmp_path):
    """The third run asks the teacher for what the second has asked, and the images are read; it stops on the way, too.
    The first one has the same views of other images."""
    kept, alphas = Kept(targets=True), ("method.alpha=0.25", "method.alpha=1.0")
    shared = [tiny_run(alpha, "data.cache=decoded", f"run_dir={tmp_path}/{alpha}") for alpha in alphas]
    plain = tiny_run(alphas[1], f"run_dir={tmp_path}/plain")
    worker(resolve(plain))
    worker(resolve(tiny_run("data.forget.classes=[bee]", f"run_dir={tmp_path}/other")), kept=kept)
    worker(resolve(shared[0]), kept=kept)
    teacher, images, recipes = kept._teacher, kept.images(shared[0]), kept.targets._recipes
    known, read = [set(each.held) for each in recipes.values()], images.bytes
    assert [len(held) for held in known] == [4, 4] and read, "four steps of two sets, no dry-run step"
    seen = []
    worker(resolve(shared[1]), seen.append, until=2, kept=kept)
    assert [row["step"] for row in seen] == [1, 2] and seen[-1]["steps"] == 4
    worker(resolve(shared[1]), seen.append, kept=kept)
    assert [row["step"] for row in seen] == [1, 2, 3, 4]
    assert kept._teacher is teacher and [set(each.held) for each in recipes.values()] == known
    assert kept.images(shared[1]) is images and images.bytes == read
    assert weights_of(plain) == weights_of(shared[1]) != weights_of(shared[0])

    images.room = 0
    images.make_room({})
    assert images.bytes == images.row_groups.bytes, "what no run wants is let go where room is short"


@pytest.mark.parametrize(
    ("method", "option"),
    [("random_encoder", "alpha"), ("retain_label", "alpha"), ("decoupling", "threshold"),
     ("epsilon_constrained", "r")],
)  # fmt: skip
def test_methods_share_what_the_teacher_made(method, option, tiny_run, tmp_path):
    """Of runs that differ in an option of the loss alone; what the teacher is shown is told by the other options."""
    kept = Kept(targets=True)

    def run(value: float, name: str, *more: str):
        return tiny_run(f"method.name={method}", f"method.{option}={value}", f"run_dir={tmp_path}/{name}", *more)

    one, other, plain = run(0.1, "one"), run(0.9, "other"), run(0.9, "plain")
    worker(resolve(plain))
    for each in (one, other):
        worker(resolve(each), kept=kept)
    assert len(kept.targets._recipes) == 1 and len(next(iter(kept.targets._recipes.values())).held) == 4
    assert weights_of(plain) == weights_of(other)
    worker(resolve(run(0.9, "relative", "seed=5")), kept=kept)
    assert len(kept.targets._recipes) == 2


def test_targets_come_back_as_they_were_within_the_limit():
    """Laid out alike, several levels too; what there is no room for is computed again, and a recipe that no run has
    asked for in a while makes room."""
    device, kib, made = torch.device("cpu"), 1 << 10, []

    def compute(number: int):
        made.append(number)
        whole = torch.arange(number, number + 120.0).view(2, 3, 4, 5)
        return [whole.contiguous(memory_format=torch.channels_last), whole[:, 1:].bfloat16()]

    targets = Targets(8 * kib)
    targets.begin("one")
    first = targets.get("a", device, lambda: compute(0))
    again = targets.get("a", device, lambda: compute(0))
    assert made == [0] and isinstance(again, list)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride() and one.dtype == other.dtype
        assert one.data_ptr() != other.data_ptr()
    single = torch.ones(3)
    assert torch.equal(targets.get("single", device, lambda: single), targets.get("single", device, lambda: 1 / 0))
    for number in range(1, 20):
        targets.get(number, device, lambda number=number: compute(number))
    assert targets.bytes <= 8 * kib and targets.get(1, device, lambda: 1 / 0)[0][0, 0, 0, 0] == 1
    held = dict(targets._recipes["one"].held)
    targets.begin("two")
    targets.get("a", device, lambda: compute(100))
    assert targets.get("a", device, lambda: compute(200))[0][0, 0, 0, 0] == 200, "no room yet"
    targets.begin("one")
    assert targets._recipes["one"].held == held
    for _ in range(RUNS):
        targets.begin("two")
    targets.get("a", device, lambda: compute(300))
    assert targets.get("a", device, lambda: 1 / 0)[0][0, 0, 0, 0] == 300 and "one" not in targets._recipes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_targets_of_a_gpu_wait_for_nothing():
    """They lie in page-locked memory, and come and go while the stream works on."""
    device, targets = torch.device("cuda"), Targets(64 << 20)
    targets.begin("one")
    targets.get("first", device, lambda: torch.zeros(1, device=device))  # a chunk, which takes a while to come by
    made = torch.randn(1 << 20, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        targets.get("a", device, lambda: made)
        back = targets.get("a", device, lambda: 1 / 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert back.device.type == "cuda" and torch.equal(back, made)
    assert all(chunk.is_pinned() for chunk in targets._recipes["one"].chunks)
