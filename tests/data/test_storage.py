"""Storage: local folders and S3 alike; what is written is there whole or not at all; errors tell no secret."""

import errno
import fcntl
import os
import pickle
import resource
import socket
import threading
import tracemalloc
from collections.abc import Callable

import pytest
from support.s3 import ADMIN, BUCKET, READER

from unlearn.data import s3 as s3_objects
from unlearn.data import s3_client
from unlearn.data.storage import Storage, download, local_copy, local_folder
from unlearn.errors import StorageError


def test_every_verb(place, tmp_path):
    storage = Storage(place)
    assert storage.files() == [] and not storage.is_file("a/b.txt")
    storage.write("a/b.txt", b"one")
    storage.write("a/b.txt", b"two")
    storage.write("a/c d/é.bin", b"")
    storage.write("ab/x", b"x" * 3000)
    assert storage.files() == ["a/b.txt", "a/c d/é.bin", "ab/x"] and storage.files("a") == ["a/b.txt", "a/c d/é.bin"]
    assert storage.files("a/b.txt") == storage.files("nothing") == []
    assert storage.read("a/b.txt") == b"two" and storage.read("a/c d/é.bin") == b""
    assert storage.is_file("a/b.txt") and storage.is_file("ab/x") and not storage.is_file("a")
    assert Storage(storage.where("a/b.txt")).read() == b"two" and Storage(storage.where("a/b.txt")).is_file()
    source = tmp_path / "source"
    source.write_bytes(b"uploaded")
    storage.upload(source, "up/file")
    assert storage.read("up/file") == b"uploaded" and not source.exists()
    with storage.open("ab/x") as file:
        file.seek(2990)
        assert file.size() == 3000 and file.read(100) == b"x" * 10
    with local_copy(storage.where("a/b.txt")) as path:
        assert path.name == "b.txt" and path.read_bytes() == b"two"
    storage.delete("a/b.txt")
    assert storage.files("a") == ["a/c d/é.bin"]
    storage.delete("a")
    storage.delete("a")
    storage.delete("nothing")
    assert storage.files() == ["ab/x", "up/file"]


def test_missing_things_are_told_by_their_full_name(place):
    storage = Storage(place)
    storage.write("x", b"1")
    for call in (storage.read, storage.open):
        with pytest.raises(StorageError, match=f"{storage.uri}/gone: there is no such"):
            call("gone")
    with pytest.raises(StorageError, match="gone"), local_copy(storage.where("gone")):
        pass


def test_a_place_is_the_same_in_another_process(place, tmp_path, monkeypatch):
    Storage(place).write("x", b"1")
    copy = pickle.loads(pickle.dumps(Storage(place)))
    assert copy.uri == Storage(place).uri and copy.read("x") == b"1"
    monkeypatch.chdir(tmp_path)
    assert Storage("x/../y").uri == str(tmp_path / "y") == Storage(f"file://{tmp_path}/y").uri
    assert Storage("s3://bucket/x/").uri == "s3://bucket/x" and Storage("s3://bucket/").uri == "s3://bucket"


def test_thousands_of_objects_are_listed_and_deleted(s3):
    storage = Storage(s3)
    names = [f"many/{i:04d}" for i in range(1005)]
    halves = [threading.Thread(target=lambda part=names[i::4]: [storage.write(n, b"") for n in part]) for i in range(4)]
    for t in halves:
        t.start()
    for t in halves:
        t.join()
    assert storage.files("many") == names
    storage.delete("many")
    assert storage.files() == []


def test_a_reader_never_sees_half_a_file(place):
    storage, texts, seen, stop = Storage(place), [b"a" * 300_000, b"b" * 300_000], set(), threading.Event()
    storage.write("x", texts[0])

    def read():
        while not stop.is_set():
            seen.add(storage.read("x"))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(15):
        storage.write("x", texts[i % 2])
    stop.set()
    reader.join()
    assert seen <= set(texts) and seen


def test_a_write_to_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    storage = Storage(tmp_path)
    storage.write("x", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            storage.write("x", b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["x"] and storage.read("x") == b"old"


def test_a_large_file_goes_in_parts_and_is_never_held(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(s3_objects, "PART", 5 << 20)
    storage, source, data = Storage(s3), tmp_path / "source", os.urandom(50 << 20)
    source.write_bytes(data)
    tracemalloc.start()
    try:
        storage.upload(source, "up")
        with storage.writing("written") as path:
            path.write_bytes(data)
        with local_copy(storage.where("up")) as path:
            assert path.stat().st_size == len(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(data) / 2, peak
    assert storage.bucket.head("up").etag.strip('"').endswith("-10") and not source.exists()
    assert storage.read("up") == storage.read("written") == data


def together(count: int, call: Callable[[int], object]) -> list:
    """What `call` gives for 0 .. count, all started at the same moment."""
    found, start = [None] * count, threading.Barrier(count)

    def one(i: int) -> None:
        start.wait()
        found[i] = call(i)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_one_of_many_creates(place):
    storage = Storage(place)
    for number in range(3):
        won = together(4, lambda i, name=f"a/{number}": storage.create(name, bytes([i]) * 1000))
        assert sorted(won) == [False] * 3 + [True] and storage.read(f"a/{number}") == bytes([won.index(True)]) * 1000
    assert not storage.create("a/0", b"late") and len(storage.files()) == 3
    storage.delete("a/0")
    assert storage.create("a/0", b"late") and storage.read("a/0") == b"late"


def test_one_of_many_creates_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    test_one_of_many_creates(str(tmp_path))


def test_a_replacement_meets_what_was_read_or_nothing_happens(place):
    storage = Storage(place)
    assert storage.read_version("n") is None and not storage.replace("n", b"1", "any") and storage.files() == []
    storage.write("n", b"0")

    def count(_) -> None:
        for _ in range(5):
            while not storage.replace("n", str(int((found := storage.read_version("n"))[0]) + 1).encode(), found[1]):
                pass

    together(4, count)
    assert storage.read("n") == b"20" and storage.files() == ["n"]
    data, version = storage.read_version("n")
    storage.write("n", b"another")
    assert not storage.replace("n", b"lost", version) and storage.read("n") == b"another"
    storage.delete("n")
    assert not storage.replace("n", b"lost", version) and not storage.is_file("n")


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    Storage(tmp_path).write("n", b"0")
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StorageError, match=f"{tmp_path}: this file system has no file locks"):
        Storage(tmp_path).replace("n", b"1", Storage(tmp_path).read_version("n")[1])


def test_a_conditional_write_survives_an_answer_that_is_lost(s3, proxied):
    storage = Storage(s3)
    for faults in (["lost"], ["conflict", "conflict"], ["conflict", "lost"]):
        proxied.faults["PUT"] = list(faults)
        assert storage.create("x", b"own") and not storage.create("x", b"another")
        proxied.faults["PUT"] = list(faults)
        assert storage.replace("x", b"newer", storage.read_version("x")[1]) and storage.read("x") == b"newer"
        storage.delete("x")
    storage.write("x", b"another's")
    proxied.faults["PUT"] = ["lost"]
    assert not storage.create("x", b"own") and storage.read("x") == b"another's"


def test_files_being_written_have_names_of_their_own_and_are_not_listed(tmp_path):
    storage = Storage(tmp_path)
    with storage.writing("a/x") as one, storage.writing("a/x") as other:
        assert one != other and all(socket.gethostname() in p.name and str(os.getpid()) in p.name for p in (one, other))
        one.write_bytes(b"one")
        other.write_bytes(b"other")
        assert len(os.listdir(tmp_path / "a")) == 2 and storage.files() == []
    assert (
        storage.files() == ["a/x"] == [f"a/{n}" for n in os.listdir(tmp_path / "a")] and storage.read("a/x") == b"one"
    )


def test_errors_of_what_is_done_with_a_file_keep_their_place(place):
    storage = Storage(place)
    storage.write("a/x", b"1")
    uses = (
        lambda: local_copy(storage.where("a/x")),
        lambda: local_folder(storage.where("a")),
        lambda: storage.writing("new"),
    )
    for use in uses:
        for error in (FileNotFoundError(2, "another file"), OSError(errno.ENOSPC, "no room"), ValueError("else")):
            with pytest.raises(type(error)) as told, use():
                raise error
            assert told.value is error
    assert storage.files() == ["a/x"]


def test_a_folder_is_fetched_whole_and_nothing_out_of_it(s3, tmp_path):
    storage = Storage(s3)
    for name in ("m/config.json", "m/unet/w.bin", "mm/no"):
        storage.write(name, name.encode())
    with local_folder(f"{s3}/m/") as folder:
        found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert folder.name == "m" and found == {"config.json": b"m/config.json", "unet/w.bin": b"m/unet/w.bin"}
    s3_client.client().put_object(
        Bucket=BUCKET, Key=f"{storage.bucket.prefix}/m/", Body=b""
    )  # as consoles mark a folder
    assert storage.files("m") == ["m/config.json", "m/unet/w.bin"]
    with local_folder(f"{s3}/m") as folder:
        assert (folder / "config.json").exists()
    with pytest.raises(StorageError, match="leads out of its folder"):
        download(storage, dict.fromkeys(["m/config.json", "m/../../evil"]), tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["config.json"]


def test_a_failing_upload_keeps_the_source_and_writes_nothing(tmp_path):
    (tmp_path / "target").mkdir()
    source = tmp_path / "source"
    source.write_bytes(b"1")
    with pytest.raises(StorageError):
        Storage(tmp_path).upload(source, "missing-folder/../target")
    with pytest.raises(StorageError, match="target"):
        Storage(tmp_path).write("target", b"1")
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]


def _says_nothing_secret(error: pytest.ExceptionInfo) -> bool:
    shown = error.value.__cause__ or (None if error.value.__suppress_context__ else error.value.__context__)
    told = f"{error.value} {shown!r}"
    return not any(word in told for word in (*ADMIN, *READER, "wrong-key", "wrong-secret"))


def _calls(storage: Storage, tmp_path):
    """Every verb that asks the server, as (name, call)."""
    source = tmp_path / "source"
    source.write_bytes(b"1")
    yield "read", lambda: storage.read("x")
    yield "write", lambda: storage.write("x", b"1")
    yield "is_file", lambda: storage.is_file("x")
    yield "files", lambda: storage.files()
    yield "open", lambda: storage.open("x")
    yield "upload", lambda: storage.upload(source, "x")
    yield "delete", lambda: storage.delete("x")


@pytest.mark.parametrize(
    "user, hint",
    [
        (("wrong-key", ADMIN[1]), "access key is not known|these credentials"),
        ((ADMIN[0], "wrong-secret"), "secret does not fit|these credentials"),
    ],
)
def test_wrong_credentials_are_told_and_not_printed(s3, s3_user, tmp_path, user, hint):
    Storage(s3).write("x", b"1")
    s3_user(user)
    for name, call in _calls(Storage(s3), tmp_path):
        with pytest.raises(StorageError, match=hint) as e:
            call()
        assert _says_nothing_secret(e) and str(e.value).startswith(s3), name
    assert (tmp_path / "source").exists()


def test_a_bucket_that_is_not_there_is_told(s3, tmp_path):
    for name, call in _calls(Storage("s3://no-such-bucket/x"), tmp_path):
        with pytest.raises(StorageError, match="no such bucket|object or bucket") as e:
            call()
        assert _says_nothing_secret(e), name


def test_who_may_only_read_reads_and_is_told_so_on_writing(s3, s3_user, tmp_path):
    Storage(s3).write("x", b"1")
    s3_user(READER)
    storage = Storage(s3)
    assert storage.read("x") == b"1" and storage.files() == ["x"] and storage.open("x").read() == b"1"
    source = tmp_path / "source"
    source.write_bytes(b"2")
    for call in (lambda: storage.write("x", b"2"), lambda: storage.upload(source, "y"), lambda: storage.delete("x")):
        with pytest.raises(StorageError, match="may not do this") as e:
            call()
        assert _says_nothing_secret(e)
    assert storage.files() == ["x"] and storage.read("x") == b"1" and source.exists()


def test_no_server_is_told(s3_user):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    s3_user(ADMIN, f"http://127.0.0.1:{port}")
    with pytest.raises(StorageError, match="no S3 server answers") as e:
        Storage(f"s3://{BUCKET}/x").read("y")
    assert _says_nothing_secret(e)


def test_no_credentials_are_told(s3, s3_user, monkeypatch):
    s3_user(ADMIN)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="no S3 credentials found: set AWS_PROFILE"):
        Storage(s3).read("x")


@pytest.mark.parametrize(
    "uri, message",
    [
        ("s3://", "name the bucket"),
        ("gs://bucket/x", "only paths, file:// and s3://"),
        ("embedded:nothing", "carries nothing of that name"),
    ],
)
def test_a_place_that_cannot_be_is_told(uri, message):
    with pytest.raises(StorageError, match=message):
        Storage(uri)


def test_a_reader_that_begins_at_the_end_needs_one_request_for_it(s3, proxied, tmp_path):
    large, small = bytes(range(256)) * 800, b"PAR1"
    for root in (s3, str(tmp_path)):
        storage = Storage(root)
        for name, data in (("large", large), ("small", small), ("empty", b"")):
            storage.write(name, data)
            proxied.requests.clear()
            facts, file = storage.open_from_end(name, 1000)
            file.seek(max(0, len(data) - 1000))
            assert file.read() == data[-1000:] and facts == storage.facts(name)
            if root == s3 and data:
                assert [method for method, _ in proxied.requests] == ["GET", "HEAD"], "the latter is of `facts`"
            file.seek(0)
            assert file.read() == data
            file.seek(max(0, len(data) - 1001))
            assert file.read(2) == data[-1001:][:2]
        with pytest.raises(StorageError, match="there is no such"):
            storage.open_from_end("missing", 1000)


def test_a_download_needs_no_request_for_the_size(s3, proxied, monkeypatch):
    """The first piece tells it, and the version that all others are to have."""
    monkeypatch.setattr(s3_objects, "PART", 1 << 16)
    storage, data = Storage(s3), os.urandom(150_000)
    for name, content, asked in (("large", data, 3), ("small", data[:9], 1), ("whole", data[: 1 << 16], 1)):
        storage.write(name, content)
        proxied.requests.clear()
        with local_copy(storage.where(name)) as path:
            assert path.read_bytes() == content
        assert [method for method, _ in proxied.requests] == ["GET"] * asked
    storage.write("empty", b"")
    with local_copy(storage.where("empty")) as path:
        assert path.read_bytes() == b""
    with pytest.raises(StorageError, match="missing: there is no such file"), local_copy(storage.where("missing")):
        pass
