"""What a run logs: published aside, tried again, whole at the end; followed without reading anything twice."""

import json
import logging
import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from support.s3 import ADMIN

from unlearn.data.storage import Storage
from unlearn.errors import StorageError
from unlearn.training import metrics
from unlearn.training.metrics import Follower, MetricsLog


def row(step: int, **more) -> dict:
    return {"step": step, "steps": 9, "loss": 1 / (step + 1)} | more


def until(true) -> None:
    """Wait for the thread that publishes; the machine may be busy."""
    deadline = time.monotonic() + 600
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_rows_are_json_lines_and_a_resumed_run_keeps_those_before_it(place):
    with MetricsLog(place, 0, every=0.01) as log:
        for step in range(1, 6):
            log.attach("bad_images.json", f"[{step}]".encode())
            log.add(row(step))
            until(lambda step=step: metrics.read(place)[-1:] == [row(step)])
    text = Storage(place).read("metrics.jsonl")
    assert [json.loads(line) for line in text.splitlines()] == [row(n) for n in range(1, 6)] and text.endswith(b"\n")
    assert Storage(place).read("bad_images.json") == b"[5]"
    with MetricsLog(place, 3) as log:
        log.add(row(4, workers=2))
    assert metrics.read(place) == [*(row(n) for n in (1, 2, 3)), row(4, workers=2)]
    with MetricsLog(place, 0):
        pass  # it has said nothing yet
    assert len(metrics.read(place)) == 4
    assert any(name.startswith("tensorboard/events") for name in Storage(place).files())


def test_a_flush_waits_for_every_row_and_an_error_ends_with_what_there_was(place):
    with MetricsLog(place, 0, every=1000) as log:
        for step in range(1, 4):
            log.add(row(step))
            log.flush()
            assert metrics.read(place)[-1] == row(step)
        log.flush()
    with pytest.raises(KeyboardInterrupt), MetricsLog(place, 3, every=1000) as log:
        log.add(row(4))
        raise KeyboardInterrupt
    assert len(metrics.read(place)) == 4


def test_training_never_waits_for_the_storage(proxied, s3, caplog):
    """Every PUT stalls: rows are taken all the same, and are there once the storage answers."""
    with MetricsLog(s3, 0, every=0.01) as log:
        log.add(row(1))
        log.flush()
        proxied.faults["PUT"] = ["stall"] * 100
        log.add(row(2))
        until(lambda: len(proxied.faults["PUT"]) < 100)  # the thread hangs in it
        for step in range(3, 200):
            log.add(row(step))
        assert len(metrics.read(s3)) == 1
        with pytest.raises(StorageError, match="has not answered"):
            log.flush(wait=0.1)
        proxied.faults.clear()
        proxied.go.set()
    assert [r["step"] for r in metrics.read(s3)] == list(range(1, 200))


def test_what_fails_is_told_once_tried_again_and_never_lost(tmp_path, caplog):
    """The run folder cannot be written to for a while, as where a disk is full; at the end it is an error."""
    folder = tmp_path / "run"
    log = MetricsLog(str(folder), 0, every=0.01, wait=300)
    log.add(row(1))
    log.flush()
    held = folder / "metrics.jsonl"
    held.rename(tmp_path / "aside")
    held.mkdir()  # nothing can take this name
    with caplog.at_level(logging.WARNING):
        log.add(row(2))
        until(lambda: caplog.records)
        time.sleep(0.2)
        log.add(row(3))
    assert len([r for r in caplog.records if "cannot be published now" in r.message]) == 1
    held.rmdir()
    log.close()
    assert metrics.read(str(folder)) == [row(1), row(2), row(3)]

    before = set(threading.enumerate())  # whatever other tests of this process have left
    log = MetricsLog(str(folder), 3, wait=0.5)
    held.unlink()
    held.mkdir()
    log.add(row(4))
    with pytest.raises(StorageError, match="metrics.jsonl"):
        log.close()
    assert "metrics" not in {thread.name for thread in threading.enumerate() if thread not in before}


def test_a_mistake_in_a_row_is_not_swallowed(tmp_path):
    log = MetricsLog(str(tmp_path), 0)
    log.add({"step": 1, "loss": object()})
    with pytest.raises(TypeError, match="object is not JSON serializable|not JSON"):
        log.close()


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    follower = Follower(str(tmp_path))
    assert follower.rows() == [] and follower.newest() is None
    file.write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2))[:9])
    assert metrics.read(str(tmp_path)) == [row(1)] == follower.rows() and follower.rows() == []
    file.write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2)) + "\n")
    assert follower.rows() == [row(2)] and follower.newest() == row(2)


def test_a_follower_reads_what_is_new_alone(proxied, s3):
    with MetricsLog(s3, 0, every=1000) as log:
        for step in range(1, 51):
            log.add(row(step))
        log.flush()
        follower = Follower(s3)
        assert len(follower.rows()) == 50
        size = len(Storage(s3).read("metrics.jsonl"))

        def asked() -> int:
            return proxied.count("GET", "metrics.jsonl")

        before = asked()
        assert follower.rows() == [] and asked() == before
        log.add(row(51))
        log.flush()
        taken = proxied.bytes("metrics.jsonl")
        assert follower.rows() == [row(51)] and asked() == before + 1
        assert proxied.bytes("metrics.jsonl") - taken < 0.1 * size


@pytest.mark.parametrize("steps", [2, 12])
def test_a_follower_notices_that_a_resumed_run_has_written_anew(place, steps):
    """Shorter than before, or longer: the figures of time differ from those that were read."""
    follower = Follower(place)
    with MetricsLog(place, 0) as log:
        for step in range(1, 6):
            log.add(row(step, images_per_s=step))
    assert len(follower.rows()) == 5
    with MetricsLog(place, 1) as log:
        for step in range(2, steps + 1):
            log.add(row(step, images_per_s=2.5 * step))
    assert [r["step"] for r in follower.rows()] == list(range(1, steps + 1))
    assert follower.newest()["images_per_s"] == 2.5 * steps and follower.rows() == []


def test_a_run_is_followed_to_its_end(tmp_path):
    work, seen = Future(), []
    (tmp_path / "latents.json").write_text('{"latents": 1, "of": 3}')
    following = threading.Thread(target=metrics.follow, args=(str(tmp_path), work, seen.append, 0.01))
    following.start()
    until(lambda: seen == [{"latents": 1, "of": 3}])
    with MetricsLog(str(tmp_path), 0, every=0.01) as log:
        for step in (1, 2):
            log.add(row(step))
            until(lambda step=step: seen[-1] == row(step))
    Path(tmp_path, "metrics.jsonl").write_bytes(b"{\n")  # a damaged file does not end a run
    time.sleep(0.1)
    work.set_result(None)
    following.join(timeout=600)
    assert seen == [{"latents": 1, "of": 3}, row(1), row(2)] and not following.is_alive()


def test_wrong_credentials_are_an_error_at_the_end_alone(s3, s3_user, caplog):
    log = MetricsLog(s3, 0, every=0.01, wait=1)
    s3_user((ADMIN[0], "wrong"), os.environ["AWS_ENDPOINT_URL"])
    log.add(row(1))
    with pytest.raises(StorageError, match="the secret does not fit the access key"):
        log.close()
