"""Remote files are fetched once a machine: by one of its processes for all, kept while any uses them, gone after the
last."""

import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unlearn.data import node_cache
from unlearn.data.node_cache import node_copy, release
from unlearn.data.storage import Storage
from unlearn.errors import StorageError

USE = """
import sys
from unlearn.data.node_cache import node_copy
path = node_copy(sys.argv[1])
print(path, flush=True)
sys.stdin.readline()
"""
LARGE = os.urandom(10 << 20)


def until(true: Callable[[], object]) -> None:
    """Wait for what other processes do; the machine may be busy."""
    deadline = time.monotonic() + 600
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def user(tmp_path, monkeypatch):
    """user(uri) -> a process that asks for it, prints the path, and uses it until its standard input is closed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    started = []

    def start(uri: str, script: str = USE) -> subprocess.Popen:
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", script, uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Copies of this process go to a folder of the test's own and are given up after it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield tmp_path / "tmp"
    node_cache._release_all()


def path_of(process: subprocess.Popen) -> Path:
    return Path(process.stdout.readline().strip())


def end(process: subprocess.Popen) -> None:
    process.communicate("\n")
    assert process.returncode == 0


def copies(tmp_path: Path) -> list[str]:
    root = tmp_path / f"unlearn-{os.getuid()}" / "copies"
    return sorted(p.name for p in root.iterdir())


def test_many_processes_fetch_once_and_the_last_deletes(s3, proxied, user, tmp_path):
    uri = f"{s3}/model/weights.safetensors"
    Storage(s3).write("model/weights.safetensors", LARGE)
    processes = [user(uri) for _ in range(4)]
    paths = {path_of(p) for p in processes}
    path = paths.pop()
    assert not paths and path.name == "weights.safetensors" and path.read_bytes() == LARGE
    assert path.is_relative_to(tmp_path) and proxied.count("GET", "weights.safetensors") == 1
    assert (tmp_path / f"unlearn-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    for process in processes[:3]:
        end(process)
    assert path.exists()
    late = user(uri)
    assert path_of(late) == path
    end(processes[3])
    assert path.exists()
    end(late)
    assert copies(tmp_path) == [] and proxied.count("GET", "weights.safetensors") == 1


def test_what_a_killed_process_left_is_used_again_or_deleted(s3, proxied, user, tmp_path):
    storage = Storage(s3)
    storage.write("a", b"a" * 1000)
    storage.write("b", b"b")
    killed = user(f"{s3}/a")
    path = path_of(killed)
    killed.kill()
    killed.wait()
    assert path.exists()
    again, other = user(f"{s3}/a"), None
    assert path_of(again) == path and proxied.count("GET", "/a") == 1
    again.kill()
    again.wait()
    other = user(f"{s3}/b")
    assert path_of(other).read_bytes() == b"b" and not path.exists()
    end(other)
    assert copies(tmp_path) == []


def test_a_process_killed_while_it_fetches_is_followed_by_one_that_waits(s3, proxied, user, tmp_path):
    Storage(s3).write("w", LARGE)
    proxied.faults["GET"] = ["stall"]
    first = user(f"{s3}/w")
    until(lambda: proxied.count("GET", "/w") == 1)
    asked = proxied.count("HEAD", "/w")
    waiting = [user(f"{s3}/w") for _ in range(2)]
    until(lambda: proxied.count("HEAD", "/w") == asked + 2)
    first.kill()
    first.wait()
    paths = [path_of(p) for p in waiting]
    assert paths[0] == paths[1] and paths[0].read_bytes() == LARGE and proxied.count("GET", "/w") == 2
    for process in waiting:
        end(process)
    assert copies(tmp_path) == []


FORKED = """
import os, sys, time
from unlearn.data.node_cache import node_copy
path = node_copy(sys.argv[1])
if (idle := os.fork()) == 0:
    sys.exit()
os.waitpid(idle, 0)
assert path.exists()
parent, (asked, ask) = os.getpid(), os.pipe()
if os.fork() == 0:
    node_copy(sys.argv[1])
    os.write(ask, b"1")
    while os.getppid() == parent:
        time.sleep(0.05)
    print(path if path.exists() else "gone", flush=True)
    sys.stdin.readline()
else:
    os.read(asked, 1)
"""


def test_a_forked_child_deletes_nothing_of_its_parent_and_can_hold_a_copy_of_its_own(s3, user, tmp_path):
    Storage(s3).write("w", b"w")
    parent = user(f"{s3}/w", FORKED)
    assert path_of(parent).read_bytes() == b"w"
    end(parent)
    until(lambda: copies(tmp_path) == [])


def test_a_child_of_multiprocessing_deletes_what_it_used(s3, own):
    Storage(s3).write("w", b"w")
    process = multiprocessing.get_context("fork").Process(target=node_copy, args=(f"{s3}/w",))
    process.start()
    process.join()
    assert process.exitcode == 0 and copies(own) == []


def test_a_folder_is_copied_whole_and_given_up_on_request(s3, proxied, own):
    storage = Storage(s3)
    for name in ("pipe/model_index.json", "pipe/unet/w.bin"):
        storage.write(name, name.encode())
    path = node_copy(f"{s3}/pipe/")
    assert path.name == "pipe" and (path / "unet/w.bin").read_bytes() == b"pipe/unet/w.bin"
    assert node_copy(f"{s3}/pipe") == path and proxied.count("GET", ".bin") == 1
    release(path)
    assert copies(own) == []
    again = node_copy(f"{s3}/pipe")
    assert (again / "model_index.json").read_bytes() == b"pipe/model_index.json" and proxied.count("GET", ".bin") == 2


def test_a_changed_object_is_another_copy(s3, own):
    Storage(s3).write("w", b"old")
    old = node_copy(f"{s3}/w")
    Storage(s3).write("w", b"new")
    assert node_copy(f"{s3}/w").read_bytes() == b"new" and old.read_bytes() == b"old"


def test_a_local_path_is_handed_back(tmp_path, own):
    (tmp_path / "w").write_bytes(b"1")
    assert node_copy(str(tmp_path / "w")) == tmp_path / "w" and node_copy(f"file://{tmp_path}") == tmp_path
    release(tmp_path / "w")
    assert (tmp_path / "w").exists() and not own.exists()
    with pytest.raises(StorageError, match=f"{tmp_path}/gone: there is no such file or folder"):
        node_copy(str(tmp_path / "gone"))


def test_what_cannot_be_fetched_is_told_and_leaves_no_copy(s3, own):
    with pytest.raises(StorageError, match=f"{s3}/gone: there is no such file or folder"):
        node_copy(f"{s3}/gone")
    Storage(s3).write("w", LARGE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match=f"{s3}/w: File too large"):
            node_copy(f"{s3}/w")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(name.endswith(".lock") for name in copies(own))
    assert node_copy(f"{s3}/w").read_bytes() == LARGE


@pytest.mark.parametrize("kind", ["open", "link"])
def test_a_folder_that_others_may_enter_is_refused(s3, own, tmp_path, kind):
    Storage(s3).write("w", b"1")
    private = own / f"unlearn-{os.getuid()}"
    own.mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    private.mkdir() if kind == "open" else private.symlink_to(tmp_path / "elsewhere")
    private.chmod(0o755 if kind == "open" else 0o700)
    with pytest.raises(StorageError, match="not a folder that this user alone may enter"):
        node_copy(f"{s3}/w")
