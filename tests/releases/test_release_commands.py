"""`unlearn release`: from a run that was trained to a release that is verified, and what the commands say."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from support.command import refused
from support.releases import finished
from support.runs import evaluate, tiny_config, train

from unlearn import certificate
from unlearn.models import weights


@pytest.fixture
def commands(told, tmp_path, monkeypatch):
    """commands(*arguments) -> as `told`, in a store of the test's own with keys of its own."""
    certificate.generate(str(tmp_path / "k"))
    monkeypatch.setenv("UNLEARN_RELEASES", str(tmp_path / "store"))
    monkeypatch.setenv("UNLEARN_RELEASE_KEY", str(tmp_path / "k.key"))
    return lambda *arguments: told("release", *arguments)


def test_a_run_is_published_and_its_release_measured_again(commands, tiny_shards, tiny_model, tmp_path):
    settings = tiny_config(tmp_path / "run", tiny_shards, tiny_model, "training.steps=1")
    train(settings)
    assert "no metrics.json there" in refused(commands, "publish", tmp_path / "run")
    evaluate(settings)
    (tmp_path / "gate.yaml").write_text("metrics.unlearned.retain.psnr: {min: 0, base: {min: -50}}\n")
    (tmp_path / "served.txt").write_text(f"\ufeff{'a' * 64}\n{'b' * 64}\n")
    code, out, _ = commands(
        "publish", tmp_path / "run", "--gate", tmp_path / "gate.yaml", "--requests", tmp_path / "served.txt"
    )
    assert code == 0 and "v1: published, in" in out and "passed: metrics.unlearned.retain.psnr against the base" in out
    (folder,) = (tmp_path / "store").glob("v1-*")
    code, out, _ = commands("verify", folder, "--key", tmp_path / "k.pub")
    assert code == 0 and "good; 5 files as" in out and "serve 2 deletion request(s)" in out
    assert "Not claimed:" in out and "it is evidence, not proof" in out and "there is none with it" in out
    # The folder is a model like any other.
    released = settings.model.model_copy(update={"weights": str(folder / "model")})
    assert weights.build(released).options == weights.build(settings.model).options
    (folder / "metrics.json").write_text("{}")
    (folder / "more").write_text("")
    said = refused(commands, "verify", folder, "--key", tmp_path / "k.pub")
    assert "changed: metrics.json; added: more" in said
    code, out, _ = commands("verify", folder, "--key", tmp_path / "k.pub", "--json")
    assert code == 2 and json.loads(out)["changed"] == ["metrics.json"] and json.loads(out)["good"] is False


def test_the_life_of_a_release(commands, tmp_path):
    for command in ("list", "rollback"):
        assert "there is no such store, nothing was ever published there" in refused(commands, command)
    a, b = "a" * 64, "b" * 64
    for number, requests in ((1, [a]), (2, [a, b])):
        run = finished(str(tmp_path / f"run-{number}"), number, forget=0.6 - number / 10)
        options = [part for request in requests for part in ("--request", request)]
        assert commands("publish", run, *options)[0] == 0
        assert f"current: v{number}" in commands("promote", f"v{number}", "--key", tmp_path / "k.pub", "--by", "ada")[1]
    assert (
        "this model was published before" in commands("publish", tmp_path / "run-2", "--request", b, "--request", a)[1]
    )
    listed = json.loads(commands("list", "--json")[1])
    assert [(r["version"], r["state"], len(r["requests"])) for r in listed] == [
        ("v1", "was current", 1),
        ("v2", "current", 2),
    ]
    assert "v1 remembers what v2 has forgotten: 1 request(s)" in refused(commands, "rollback")
    assert "--force wants its reason" in refused(commands, "rollback", "--force")
    out = commands("rollback", "--force", "--reason", "v2 paints eyes")[1]
    assert "it remembers 1 request(s) that others have served" in out and "current: v1" in out
    different = json.loads(commands("diff", "v1", "v2", "--json")[1])
    assert different["figures"]["metrics.unlearned.forget.cosine"] == [0.5, pytest.approx(0.4)] and different[
        "requests"
    ]["added"] == [b]
    assert different["config"]["seed"] == [1, 2] and "metrics.original.forget.cosine" not in different["figures"]
    assert "metrics.unlearned.forget.cosine" in commands("diff", "v1", "v2")[1]
    out = commands("show", "v1")[1]
    assert "v2 (follows v1)" in out and "current" in out and "Not claimed:" in out and "no gate judged them" in out
    assert json.loads(commands("show", "v1", "--json")[1])["history"][-1]["reason"] == "v2 paints eyes"
    assert "v1 is current" in refused(commands, "withdraw", "v1", "--reason", "x")
    out = commands("withdraw", "v1", "--reason", "x", "--force")[1]
    assert "v2 came from it (follows v1): look whether it must go too" in out and "current: none" in out
    assert "has no release v7" in refused(commands, "show", "v7")
    (tmp_path / "none.txt").touch()
    (tmp_path / "wide.txt").write_bytes(a.encode("utf-16"))
    for option, value, why in (
        ("--parent", "v7", "has no release v7"),
        ("--requests", "none.txt", "holds no commitment"),
        ("--requests", "wide.txt", "save it as UTF-8 text"),
        ("--request", "foo", "'foo' is no commitment: that is 64 hex digits"),
    ):
        assert why in refused(
            commands, "publish", tmp_path / "run-2", option, str(tmp_path / value) if "." in value else value
        )


def test_what_the_gate_refuses_is_told_with_its_reasons(commands, tmp_path):
    (tmp_path / "gate.yaml").write_text("metrics.unlearned.forget.cosine: {max: 0.3, base: {max: -0.7}}\n")
    said = refused(commands, "publish", finished(str(tmp_path / "run")), "--gate", tmp_path / "gate.yaml")
    assert "not released; the candidate is kept in" in said and "forget.cosine: 0.4, above max 0.3" in said
    assert "forget.cosine against the base: -0.5 (0.4, base 0.9), above max -0.7" in said
    code, out, _ = commands("list", "--rejected")
    assert code == 0 and "run-0" in out and "above max 0.3" in out
    code, out, _ = commands("publish", tmp_path / "run", "--gate", tmp_path / "gate.yaml", "--json")
    assert code == 2 and json.loads(out)["version"] is None and json.loads(out)["gate"]["passed"] is False


def test_keys_and_mistakes(told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = told("release", "keygen", "mine")
    assert code == 0 and "keep it secret" in out and Path("mine.pub").is_file()
    assert "never overwritten" in refused(told, "release", "keygen", "mine")
    Path("void.key").touch()
    key = Ed25519PrivateKey.generate()
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"hush"))
    Path("locked.key").write_bytes(locked)
    for wrong in ("mine.pub", "void.key", "locked.key"):
        assert "no private Ed25519 key" in refused(told, "release", "publish", "run", "--store", "s", "--key", wrong)
    assert "no trained model there" in refused(told, "release", "publish", "run", "--store", "s", "--key", "mine.key")
    assert "no such file or folder" in refused(told, "release", "verify", "nothing", "--key", "mine.pub")
