"""S3: how it is found, and what becomes of what its servers and networks do wrong."""

import dataclasses
import json
import os
import socket
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.images import tiny_table
from support.runs import tiny_config, worker
from support.s3 import ADMIN, BUCKET, READER
from support.s3_proxy import Proxy
from support.tls import self_signed

from unlearn import config, patience
from unlearn import lease as leases
from unlearn.data import s3_client, selection, shards
from unlearn.data.row_groups import RowGroups
from unlearn.data.storage import Storage, local_folder
from unlearn.errors import ConfigError, DataError, StorageError, UnlearnError
from unlearn.training.checkpoint import Checkpoints

FAULTS = (500, 503, "cut", "lost")


@pytest.fixture
def patient(monkeypatch):
    """patient(seconds): from now on the storage is given so long."""
    return lambda seconds: monkeypatch.setenv(patience.VARIABLE, str(seconds))


def uploaded(s3: str, folder: str) -> str:
    for path in Path(folder).iterdir():
        Storage(s3).write(path.name, path.read_bytes())
    return s3


# Faults


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_in_between_ends_neither_index_nor_a_selection(s3, proxied, tiny_shards, patient, fault):
    patient(20)
    uploaded(s3, tiny_shards)
    for method in ("GET", "HEAD"):
        proxied.faults[method] = [fault] * 3 + [None, fault]
        assert len(selection.select(shards.load(s3), config.Rows(classes=["ant"]), 0, "forget")) == 12
        proxied.faults[method] = [fault] * 3 + [None, fault]
        assert shards.index(s3).rows == 48


def test_an_outage_is_waited_out_by_every_verb(s3, proxied, patient, tmp_path, caplog, monkeypatch):
    patient(60)
    monkeypatch.setattr(patience, "_told", -60.0)
    storage, source = Storage(s3), tmp_path / "source"
    storage.write("x", b"1" * 1000)
    file, lease = storage.open("x"), leases._acquire(Storage(f"{s3}/run"), "run", 60, print)

    def upload() -> bool:
        source.write_bytes(b"2")
        storage.upload(source, "u")
        return storage.read("u") == b"2"

    def renew() -> bool:
        lease._renew()
        return lease.lost == ""

    verbs = {
        "read": lambda: storage.read("x"), "range": lambda: file.read_at(10, 5) == b"1" * 10,
        "open": lambda: storage.open("x"),
        "is_file": lambda: storage.is_file("x"), "files": lambda: storage.files(),
        "write": lambda: storage.write("w", b"1") is None,
        "create": lambda: storage.create("c", b"1"), "upload": upload, "download": lambda: _fetched(storage),
        "delete": lambda: storage.delete("x") is None, "renewal": renew,
    }  # fmt: skip
    for name, verb in verbs.items():
        with proxied.outage(0.3):
            assert verb(), name
    proxied.faults["GET"] = ["lost"] * 3
    assert storage.read("w") == b"1"
    assert any("trying again, for 60 s at most (storage.patience)" in r.message for r in caplog.records)
    assert storage.files() == ["c", "run/lease.json", "u", "w"]


def _fetched(storage: Storage) -> bool:
    with local_folder(storage.uri) as folder:
        return (folder / "x").exists()


def test_a_longer_one_is_told_as_the_servers_fault(s3, proxied, tiny_shards, patient):
    uploaded(s3, tiny_shards)
    Storage(s3).write("x", b"1" * 100)
    manifest = shards.load(s3)
    patient(0.3)
    for fault, told in ((503, r"fails \(503 SlowDown\)"), ("cut", "breaks"), ("lost", "breaks")):
        proxied.faults["GET"] = [fault] * 1000
        for call in (lambda: manifest.read(0, ["image"]), lambda: shards.load(s3), lambda: Storage(s3).read("x")):
            with pytest.raises(StorageError, match=told) as e:
                call()
            assert "it was waited for, 0 s (storage.patience)" in str(e.value) and "restore" not in str(e.value)
    proxied.faults.clear()
    with proxied.outage(600), patience.at_most(0), pytest.raises(StorageError, match="breaks"):
        manifest.read(0, ["image"])


def test_a_write_that_is_repeated_after_an_outage_knows_its_own(s3, proxied, patient):
    """The answers of all attempts of the client are lost, and one is made after that: it meets what the first has
    written."""
    patient(60)
    proxied.faults["PUT"] = ["lost"] * 4
    assert Storage(s3).create("x", b"own")
    proxied.faults["PUT"] = ["lost"] * 4
    assert Storage(s3).replace("x", b"newer", Storage(s3).read_version("x")[1])


def test_a_run_waits_for_its_storage_and_ends_with_the_same_weights(s3, proxied, tiny_shards, tiny_model, patient):
    """Loader, metrics and checkpoints meet an outage at every step, with the same bits at the end."""
    data = uploaded(f"{s3}/data", tiny_shards)
    options = ("data.cache=none", "training.checkpoint_every=1", "storage.patience=60")
    runs = [tiny_config(f"{s3}/{name}", data, tiny_model, *options) for name in ("whole", "disturbed")]
    worker(runs[0])
    outages = []

    def report(row: dict) -> None:
        outages.append(proxied.outage(0.5))
        outages[-1].__enter__()

    worker(runs[1], report)
    assert len(outages) == 4
    saved = [_weights(run) for run in runs]
    assert saved[0] == saved[1]
    assert patience.seconds() == 60
    patience.use(None)


def test_a_run_on_a_server_that_stalls_every_third_request_ends_soon_with_the_same_weights(
    s3, proxied, tiny_shards, tiny_model, monkeypatch, patient
):  # fmt: skip
    """Its stalls are without end: a single one that is waited for lasts longer than the test may."""
    data = uploaded(f"{s3}/data", tiny_shards)
    runs = [tiny_config(f"{s3}/{name}", data, tiny_model, "data.cache=none") for name in ("whole", "stalled")]
    before = len(proxied.requests)
    worker(runs[0])
    whole = len(proxied.requests) - before
    patient(60)
    monkeypatch.setenv("UNLEARN_S3_HEDGE", "0.1")
    monkeypatch.setenv("UNLEARN_S3_TIMEOUT", "4")
    s3_client.client.cache_clear()
    proxied.faults = {method: ["stall" if n % 3 == 2 else None for n in range(999)] for method in ("GET", "HEAD")}
    proxied.faults["PUT"] = [None, "stall"]
    before = len(proxied.requests)
    worker(runs[1])
    assert 999 - len(proxied.faults["GET"]) > 15 and not proxied.faults["PUT"]
    assert len(proxied.requests) - before < 3 * whole
    proxied.faults.clear()
    assert _weights(runs[0]) == _weights(runs[1])


def test_the_requests_of_a_run_are_few_and_told(s3, proxied, tiny_model, logged):
    """Six steps over 16 row groups in two files."""
    for number in range(2):
        with Storage(f"{s3}/data").writing(f"{number}.parquet") as path:
            pq.write_table(tiny_table(number * 64, 64), path, row_group_size=8)
    shards.index(f"{s3}/data")
    assert len(shards.load(f"{s3}/data").groups) == 16
    proxied.requests.clear()
    s3_client.requests.clear()
    worker(tiny_config(f"{s3}/run", f"{s3}/data", tiny_model, "training.steps=6", "data.forget.classes=[1]"))
    told = next(r.message for r in logged.records if "requests to S3" in r.message)
    assert told == f"{len(proxied.requests)} requests to S3 by 1 worker(s)"
    # A row group is one and a file's end, which tells its size and version, is one; the rest are the manifest and what
    # lies beside it, metrics (as time goes), three checkpoints, and the listings that order those.
    assert proxied.count("GET", ".parquet") <= 16 + 2 and proxied.count("HEAD", ".parquet") <= 2
    assert len(proxied.requests) < 70, Counter((m, p.split("?")[0].rpartition("/")[2]) for m, p in proxied.requests)


def _weights(run: config.RunConfig) -> bytes:
    checkpoints = Checkpoints(run.run_dir, 1)
    name = next(n for n in checkpoints.storage.files() if n.endswith("safetensors") and "step-00000004" in n)
    return checkpoints.storage.read(name)


def test_a_server_that_sends_elsewhere_is_told_and_not_followed(s3, proxied, tmp_path):
    storage = Storage(s3)
    storage.write("x", b"1")
    for method, call in {
        "GET": storage.read,
        "HEAD": storage.is_file,
        "PUT": lambda name: storage.write(name, b""),
    }.items():
        proxied.faults[method] = ["elsewhere"]
        with pytest.raises(StorageError, match=r"sends elsewhere \(307, to http://elsewhere.test/data\)") as e:
            call("x")
        assert "secret" not in str(e.value) and "token" not in str(e.value)


@pytest.mark.parametrize("old", [False, True], ids=["with checksums", "without"])
def test_a_shard_that_is_replaced_during_a_run_is_named(s3, tiny_shards, old):
    """By the checksums of its values; without them, as manifests of earlier versions are, by its version."""
    manifest = shards.load(uploaded(s3, tiny_shards))
    if old:
        groups = [RowGroups.of(dataclasses.replace(g, checks={}) for g in s.row_groups) for s in manifest.shards]
        parts = [dataclasses.replace(s, row_groups=g) for s, g in zip(manifest.shards, groups, strict=True)]
        manifest = dataclasses.replace(manifest, shards=parts)
        assert not parts[0].row_groups[0].checks
    manifest.read(1, ["label"])
    stored = Storage(s3).read("shard-0.parquet")
    image = tiny_table(0, 16).column("image")[12]["bytes"].as_py()
    at = stored.index(image)
    Storage(s3).write("shard-0.parquet", stored[: at + 40] + bytes([stored[at + 40] ^ 255]) + stored[at + 41 :])
    with pytest.raises((DataError, StorageError), match=r"row group 1.*replaced") as e:
        manifest.read(1, ["image"])
    assert "shard-0.parquet" in str(e.value)


def test_an_object_that_is_replaced_while_it_is_read_is_not_mixed(s3):
    storage = Storage(s3)
    storage.write("x", b"a" * (20 << 20))
    with storage.open("x") as file:
        assert file.read(20 << 20) == b"a" * (20 << 20)  # by several requests
        storage.write("x", b"b" * (20 << 20))
        with pytest.raises(StorageError, match="replaced while it was read"):
            file.read_at(10, 0)


# How it is found


@pytest.fixture
def lost_user(s3_user, monkeypatch, tmp_path):
    """lost_user(config="...", NAME=value): an administrator whose AWS variables name no server but what is given."""

    def login(config: str = "", **variables: str) -> None:
        s3_user(ADMIN, "http://127.0.0.1:9")  # which also unsets what the call before has set
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        (tmp_path / "config").write_text(config)
        for name, value in ({"AWS_CONFIG_FILE": str(tmp_path / "config")} | variables).items():
            monkeypatch.setenv(name, value)

    return login


def reads_and_writes(s3: str) -> bool:
    storage = Storage(s3)
    storage.write("x", b"1")
    with storage.open("x") as file:
        return file.read() == storage.read("x") == b"1"


@pytest.mark.parametrize("way", ["variable", "own variable", "profile", "services", "another profile"])
def test_every_way_to_name_an_endpoint_is_heard(s3, s3_server, lost_user, way):
    nowhere = "http://127.0.0.1:9"
    ways = {
        "variable": {"AWS_ENDPOINT_URL": s3_server},
        "own variable": {"AWS_ENDPOINT_URL_S3": s3_server, "AWS_ENDPOINT_URL": nowhere},
        "profile": {"config": f"[default]\nendpoint_url = {s3_server}\n"},
        "services": {"config": f"[default]\nservices = mine\n[services mine]\ns3 =\n  endpoint_url = {s3_server}\n"},
        "another profile": {"config": f"[default]\nendpoint_url = {nowhere}\n[profile b]\nendpoint_url = {s3_server}\n",
            "AWS_PROFILE": "b"},
    }  # fmt: skip
    keys = f"aws_access_key_id = {ADMIN[0]}\naws_secret_access_key = {ADMIN[1]}\n"
    chosen = ways[way]
    lost_user(**(chosen | ({"config": chosen["config"] + keys} if way == "another profile" else {})))
    assert reads_and_writes(s3)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[str, str]:
    """(certificate, key) of 127.0.0.1, known to no one."""
    return self_signed(tmp_path_factory.mktemp("tls"))


def test_certificates_are_those_of_the_variable_or_the_profile(s3, s3_server, lost_user, certificate):
    with Proxy(s3_server, certificate).listening() as proxy:
        lost_user(AWS_ENDPOINT_URL=proxy.url)
        with pytest.raises(StorageError, match="no TLS connection: give .* AWS_CA_BUNDLE"):
            Storage(s3).write("x", b"1")
        lost_user(AWS_ENDPOINT_URL=proxy.url, AWS_CA_BUNDLE=certificate[0])
        assert reads_and_writes(s3)
        lost_user(f"[default]\nca_bundle = {certificate[0]}\n", AWS_ENDPOINT_URL=proxy.url)
        assert reads_and_writes(s3)


@pytest.mark.parametrize("way", ["variable", "profile", "neither"])
def test_buckets_are_addressed_as_is_asked_for(s3, s3_server, lost_user, monkeypatch, way):
    known = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: known("127.0.0.1", *rest, **more))
    with Proxy(s3_server).listening() as proxy:
        given = {
            "variable": {"UNLEARN_S3_ADDRESSING": "virtual"},
            "profile": {"config": "[default]\ns3 =\n  addressing_style = virtual\n"},
        }
        port = proxy.url.rpartition(":")[2]
        lost_user(**given.get(way, {}), AWS_ENDPOINT_URL=f"http://s3.test:{port}", NO_PROXY="*", no_proxy="*")
        proxy.faults["GET"] = [503] * 2
        with pytest.raises(StorageError) as refused:
            Storage(s3).read("x")
        assert proxy.requests, refused.value
        host, path = proxy.headers[0]["Host"], proxy.requests[0][1]
    if way == "neither":
        assert host == f"s3.test:{port}" and path.startswith(f"/{BUCKET}/")
    else:
        assert host == f"{BUCKET}.s3.test:{port}" and not path.startswith(f"/{BUCKET}")


def test_a_public_bucket_is_read_without_keys(s3, s3_user, lost_user, s3_server, monkeypatch):
    s3_user(ADMIN)
    Storage("s3://public/a").write("x", b"1")
    lost_user(AWS_ENDPOINT_URL=s3_server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match="no S3 credentials found: .* UNLEARN_S3_ANONYMOUS"):
        Storage("s3://public/a").read("x")
    monkeypatch.setenv("UNLEARN_S3_ANONYMOUS", "other, public")
    public = Storage("s3://public/a")
    assert public.read("x") == b"1" and public.open("x").read() == b"1" and public.files() == ["x"]
    with pytest.raises(StorageError, match="may not do this"):
        public.write("y", b"1")


def _as_profile(user: tuple[str, str]) -> str:
    return f"[default]\naws_access_key_id = {user[0]}\naws_secret_access_key = {user[1]}\n"


def test_keys_that_rotate_are_renewed_from_their_file(s3, s3_server, lost_user, monkeypatch, tmp_path):
    """When the server refuses the old ones; where the file holds no others, that is told."""
    Storage(s3).write("x", b"1")
    keys = tmp_path / "keys"
    keys.write_text(_as_profile(ADMIN))
    with Proxy(s3_server).listening() as proxy:
        lost_user(AWS_ENDPOINT_URL=proxy.url, AWS_SHARED_CREDENTIALS_FILE=str(keys))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        storage = Storage(s3)
        with storage.open("x") as file:
            keys.write_text(_as_profile(READER))
            proxy.faults["GET"] = [None, "expired"]
            assert [file.read_at(1, 0), file.read_at(1, 0), storage.read("x")] == [b"1"] * 3
        users = [READER if READER[0] in h["Authorization"] else ADMIN for h in proxy.headers]
        assert users == [ADMIN, ADMIN, ADMIN, READER, READER]  # HEAD, a range, one that is refused, the same, the whole
        proxy.faults["GET"] = ["expired"]
        with pytest.raises(StorageError, match="the session token has expired: renew it"):
            storage.read("x")


def test_keys_of_a_process_are_renewed_before_they_expire(s3, s3_server, lost_user, monkeypatch, tmp_path):
    Storage(s3).write("x", b"1")
    answer = tmp_path / "answer"

    def rotate(user: tuple[str, str]) -> None:
        soon = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
        answer.write_text(
            json.dumps({"Version": 1, "AccessKeyId": user[0], "SecretAccessKey": user[1], "Expiration": soon})
        )

    rotate(ADMIN)
    with Proxy(s3_server).listening() as proxy:
        lost_user(f"[default]\ncredential_process = /bin/cat {answer}\n", AWS_ENDPOINT_URL=proxy.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        assert Storage(s3).read("x") == b"1"
        rotate(READER)
        assert Storage(s3).read("x") == b"1"
        assert ADMIN[0] in proxy.headers[0]["Authorization"] and READER[0] in proxy.headers[-1]["Authorization"]


def test_encryption_and_who_pays_are_said_with_every_request_of_their_kind(s3, proxied, monkeypatch, tmp_path):
    monkeypatch.setenv("UNLEARN_S3_SSE", "AES256")
    monkeypatch.setenv("UNLEARN_S3_REQUESTER_PAYS", f"other, {BUCKET}")
    s3_client.client.cache_clear()
    storage, source = Storage(s3), tmp_path / "source"
    source.write_bytes(b"2")
    storage.write("x", b"1")
    storage.upload(source, "u")
    assert storage.read("x") + storage.read("u") == b"12" and storage.files() == ["u", "x"]
    sent = [{k.lower(): v for k, v in h.items() if k.lower().startswith("x-amz-")} for h in proxied.headers]
    assert all(h["x-amz-request-payer"] == "requester" for h in sent)
    methods = [method for method, _ in proxied.requests]
    assert [h.get("x-amz-server-side-encryption") for h in sent] == ["AES256" if m == "PUT" else None for m in methods]
    assert {"PUT", "GET"} <= set(methods)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "key:secret@minio:9000", "http://", "minio"])
def test_an_endpoint_without_a_scheme_is_one_clear_error(s3, lost_user, endpoint):
    lost_user(AWS_ENDPOINT_URL=endpoint)
    with pytest.raises(StorageError, match="the S3 endpoint cannot be used .*write it as http://HOST:PORT") as e:
        Storage(s3).open("x")
    assert "secret" not in str(e.value)


def test_a_wrong_bucket_is_told_as_one(s3, told, written):
    for call in (shards.load, shards.index, lambda uri: Storage(uri).is_file("x")):
        with pytest.raises(UnlearnError, match="s3://no-such-bucket/x.*: there is no such bucket"):
            call("s3://no-such-bucket/x")
    code, _, err = told("config", "check", written("data.train=s3://no-such-bucket/x"))
    assert code == 2 and "there is no such bucket" in err


def test_variables_that_make_no_sense_are_told(s3, monkeypatch, lost_user, s3_server):
    lost_user(AWS_ENDPOINT_URL=s3_server, UNLEARN_S3_ADDRESSING="weird")
    with pytest.raises(ConfigError, match="UNLEARN_S3_ADDRESSING='weird': give path, virtual, auto"):
        Storage(s3).read("x")
    lost_user(AWS_ENDPOINT_URL=s3_server, UNLEARN_S3_ADDRESSING="", UNLEARN_S3_SSE="rot13")
    with pytest.raises(ConfigError, match="UNLEARN_S3_SSE='rot13': give AES256, aws:kms"):
        Storage(s3).read("x")
    lost_user(AWS_ENDPOINT_URL=s3_server, UNLEARN_S3_SSE="", UNLEARN_S3_HEDGE="-1")
    with pytest.raises(ConfigError, match="UNLEARN_S3_HEDGE='-1': give seconds"):
        Storage(s3).read("x")
    lost_user(AWS_ENDPOINT_URL=s3_server, UNLEARN_S3_HEDGE="", AWS_SESSION_TOKEN="to\nken")
    with pytest.raises(ConfigError, match="AWS_SESSION_TOKEN holds a line end, a space or") as e:
        Storage(s3).read("x")
    assert "ken" not in str(e.value).replace("TOKEN", "")
    for wrong in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv(patience.VARIABLE, wrong)
        with pytest.raises(ConfigError, match=f"{patience.VARIABLE}='{wrong}'"):
            patience.seconds()
    assert os.environ[patience.VARIABLE] == "nan"
