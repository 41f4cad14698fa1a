"""Storage: local folders and S3 alike; what is written is there whole or not at all; errors tell no secret."""

import pickle
import resource
import socket
import threading

import pytest
from support.s3 import ADMIN, BUCKET, READER

from unlearn.data.storage import Storage, local_copy
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
    assert storage.files() == ["x"] and storage.read("x") == b"old"


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
    [(("wrong-key", ADMIN[1]), "access key is not known|these credentials"), ((ADMIN[0], "wrong-secret"), "secret does not fit|these credentials")],
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
        if name == "is_file":
            assert not call()  # the server answers for an object and a bucket alike
            continue
        with pytest.raises(StorageError, match="no such (bucket|file)") as e:
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
    [("s3://", "name the bucket"), ("gs://bucket/x", "only paths, file:// and s3://"), ("embedded:nothing", "carries nothing of that name")],
)
def test_a_place_that_cannot_be_is_told(uri, message):
    with pytest.raises(StorageError, match=message):
        Storage(uri)
