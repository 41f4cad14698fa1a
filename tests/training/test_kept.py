"""What a process keeps from run to run, and a run that is trained in legs."""

from pathlib import Path

from unlearn.run import resolve
from unlearn.training.kept import Kept
from unlearn.training.loop import worker


def test_neither_what_is_kept_nor_legs_change_a_weight(tiny_run, tmp_path):
    """The third run asks the teacher for what the second has asked, and the images are read; it stops on the way, too.
    The first one has the same views of other images."""
    kept, alphas = Kept(targets=True), ("method.alpha=0.25", "method.alpha=1.0")
    shared = [tiny_run(alpha, "data.cache=decoded", f"run_dir={tmp_path}/{alpha}") for alpha in alphas]
    plain = tiny_run(alphas[1], f"run_dir={tmp_path}/plain")
    worker(resolve(plain))
    worker(resolve(tiny_run("data.forget.classes=[bee]", f"run_dir={tmp_path}/other")), kept=kept)
    worker(resolve(shared[0]), kept=kept)
    teacher, images = kept._teacher, kept.images(shared[0])
    known, read = set(teacher[1].encode.known._held), images.bytes
    assert len(known) == 10 and read, "four steps and the dry-run step, of two sets"
    seen = []
    worker(resolve(shared[1]), seen.append, until=2, kept=kept)
    assert [row["step"] for row in seen] == [1, 2] and seen[-1]["steps"] == 4
    worker(resolve(shared[1]), seen.append, kept=kept)
    assert [row["step"] for row in seen] == [1, 2, 3, 4]
    assert kept._teacher is teacher and set(teacher[1].encode.known._held) == known
    assert kept.images(shared[1]) is images and images.bytes == read
    last = [
        [p.read_bytes() for p in Path(run.run_dir, "checkpoints/step-00000004").glob("*.safetensors")]
        for run in (plain, shared[1])
    ]
    assert last[0] == last[1] and last[0]
    first = [p.read_bytes() for p in Path(shared[0].run_dir, "checkpoints/step-00000004").glob("*.safetensors")]
    assert first != last[0]

    images.room = 0
    images.make_room({})
    assert images.bytes == images.row_groups.bytes, "what no run wants is let go where room is short"
