"""A release is checked by its folder and the public key alone; every kind of tampering is found, and named."""

import base64
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from support.releases import finished

from unlearn import certificate
from unlearn.certificate import Statement
from unlearn.errors import CertificateError, ReleaseError
from unlearn.releases import publish, verification
from unlearn.releases.store import Store


@pytest.fixture(scope="module")
def published(tmp_path_factory, signer) -> str:
    """The folder of a release. Read only."""
    root = tmp_path_factory.mktemp("published")
    run = finished(str(root / "run"), audit={"unlearned": {"auc": 0.5}})
    return publish.publish(run, Store(str(root / "store")), signer, ["a" * 64]).folder


@pytest.fixture
def folder(published, tmp_path) -> Path:
    """A copy of it to tamper with."""
    return Path(shutil.copytree(published, tmp_path / "release"))


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, change) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_bytes(json.dumps(tree, indent=1).encode() + b"\n")


@pytest.mark.parametrize("name",
    ["audit.json", "config.yaml", "metrics.json", "model/model.json", "model/weights.safetensors",
        "release.json"])  # fmt: skip
def test_a_changed_file_is_named(folder, public, name):
    assert verification.verify(str(folder), public).version == "v1"
    flip(folder / name)
    with pytest.raises(ReleaseError, match=f"is not v1 as it was published. changed: {name}$"):
        verification.verify(str(folder), public)


def test_added_removed_and_replaced_files_are_named(folder, public):
    (folder / "audit.json").unlink()
    (folder / "model/extra.py").write_text("")
    (folder / ".hidden.part").write_text("")
    (folder / "config.yaml").rename(folder.parent / "elsewhere")
    (folder / "config.yaml").symlink_to(folder.parent / "elsewhere")
    (folder / "linked").symlink_to(folder.parent)
    os.mkfifo(folder / "pipe")
    _, found = verification.inspect(str(folder), public)
    assert found.changed == ["config.yaml"], "a link may lead to something else when it is read again"
    assert found.added == [".hidden.part", "linked", "model/extra.py", "pipe"] and found.removed == ["audit.json"]
    assert str(found) == "changed: config.yaml; added: .hidden.part, linked, model/extra.py, pipe; removed: audit.json"


def test_swapped_files_and_a_renamed_one_are_named(folder, public):
    (folder / "metrics.json").rename(folder / "x")
    (folder / "audit.json").rename(folder / "metrics.json")
    (folder / "x").rename(folder / "audit.json")
    (folder / "model/model.json").rename(folder / "model/Model.json")
    _, found = verification.inspect(str(folder), public)
    assert (found.changed, found.added, found.removed) == (
        ["audit.json", "metrics.json"],
        ["model/Model.json"],
        ["model/model.json"],
    )


def test_every_byte_of_the_certificate_counts(folder, public):
    path = folder / "certificate.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 100)):
        flip(path, at)
        with pytest.raises(CertificateError):
            verification.verify(str(folder), public)
        path.write_bytes(whole)
    verification.verify(str(folder), public)


def test_a_certificate_with_another_payload_signature_or_key_is_refused(folder, public, tmp_path):
    path = folder / "certificate.json"
    whole = path.read_bytes()

    def refused(change) -> str:
        path.write_bytes(whole)
        rewrite(path, change)
        with pytest.raises(CertificateError) as told:
            verification.verify(str(folder), public)
        return str(told.value)

    def claim_more(tree: dict) -> None:
        payload = json.loads(base64.b64decode(tree["payload"]))
        payload["predicate"]["not_claimed"] = []
        tree["payload"] = base64.b64encode(json.dumps(payload, separators=(",", ":"), sort_keys=True).encode()).decode()

    assert "what was signed has been changed" in refused(claim_more)
    assert "damaged" in refused(lambda tree: tree.update(signatures=[]))
    assert "damaged" in refused(lambda tree: tree["signatures"].append(tree["signatures"][0]))
    assert "damaged" in refused(lambda tree: tree.update(note="more"))
    assert "damaged" in refused(lambda tree: tree.update(payloadType="text/plain"))
    other = certificate.generate(str(tmp_path / "other"))[1]
    assert "signed with another key" in refused(lambda tree: tree["signatures"][0].update(keyid=other.keyid))
    path.write_bytes(whole)
    with pytest.raises(CertificateError, match="signed with another key"):
        verification.verify(str(folder), other)
    # Somebody else's certificate of changed files, under the publisher's key id
    flip(folder / "metrics.json")
    statement, _ = certificate.read(whole, "")
    subject = statement.subject | {"metrics.json": hashlib.sha256((folder / "metrics.json").read_bytes()).hexdigest()}
    path.write_bytes(
        certificate.sign(
            Statement(subject, statement.predicate_type, statement.predicate),
            certificate.private_key(f"{tmp_path}/other.key"),
        )
    )
    rewrite(path, lambda tree: tree["signatures"][0].update(keyid=public.keyid))
    with pytest.raises(CertificateError, match="the signature does not fit"):
        verification.verify(str(folder), public)
    path.unlink()
    with pytest.raises(CertificateError, match="no certificate.json there"):
        verification.verify(str(folder), public)


def test_a_statement_of_another_kind_is_no_release(folder, public, signer):
    statement, _ = certificate.read((folder / "certificate.json").read_bytes(), "")

    def refused(**changes) -> str:
        changed = Statement(**(vars(statement) | changes))
        (folder / "certificate.json").write_bytes(certificate.sign(changed, signer))
        with pytest.raises((ReleaseError, CertificateError)) as told:
            verification.verify(str(folder), public)
        return str(told.value)

    assert "it states urn:unlearn:release:v2" in refused(predicate_type="urn:unlearn:release:v2")
    assert "is no release of this program" in refused(predicate={"version": "v1"})
    assert "it says something else than release.json" in refused(predicate=statement.predicate | {"not_claimed": []})


def test_the_certificate_stands_without_this_program(published, keys):
    """By the specifications of DSSE and in-toto, and the package cryptography alone."""
    envelope = json.loads(Path(published, "certificate.json").read_text())
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
    assert kind == "application/vnd.in-toto+json"
    key = load_pem_public_key(Path(f"{keys}.pub").read_bytes())
    assert isinstance(key, Ed25519PublicKey)
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    (signature,) = envelope["signatures"]
    key.verify(base64.b64decode(signature["sig"]), signed)
    with pytest.raises(InvalidSignature):
        key.verify(base64.b64decode(signature["sig"]), signed.replace(b"a" * 64, b"b" * 64))
    statement = json.loads(payload)
    assert (
        statement["_type"] == "https://in-toto.io/Statement/v1"
        and statement["predicateType"] == "urn:unlearn:release:v1"
    )
    for part in statement["subject"]:
        assert hashlib.sha256(Path(published, part["name"]).read_bytes()).hexdigest() == part["digest"]["sha256"]
    there = {path.relative_to(published).as_posix() for path in Path(published).rglob("*") if path.is_file()}
    assert {part["name"] for part in statement["subject"]} == there - {"certificate.json"}


def test_keys_are_for_their_owner_and_never_overwritten(tmp_path):
    name = str(tmp_path / "new/releases")
    path, key = certificate.generate(name)
    assert path == f"{name}.pub" and os.stat(f"{name}.key").st_mode & 0o777 == 0o600
    assert certificate.private_key(f"{name}.key").public_key.keyid == key.keyid == certificate.public_key(path).keyid
    before = Path(f"{name}.key").read_bytes()
    with pytest.raises(CertificateError, match="never overwritten"):
        certificate.generate(name)
    os.unlink(f"{name}.pub")
    with pytest.raises(CertificateError, match="releases.key is there already"):
        certificate.generate(name)
    assert Path(f"{name}.key").read_bytes() == before and not os.path.exists(f"{name}.pub")
    with pytest.raises(CertificateError, match="no public Ed25519 key"):
        certificate.public_key(f"{name}.key")
    with pytest.raises(CertificateError, match="gone: No such file"):
        certificate.private_key(str(tmp_path / "gone"))
    for text in ("", "secret-text", "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n"):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(CertificateError, match="no private Ed25519 key") as told:
            certificate.private_key(str(tmp_path / "bad"))
        assert "c2VjcmV0" not in str(told.value) and "secret" not in str(told.value)
