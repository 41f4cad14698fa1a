"""Publishing: once, whoever publishes beside; killed anywhere it leaves nothing that counts; evidence of another model
is refused."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from support.releases import elliptic_keys, finished, weights_of

from unlearn import certificate
from unlearn.data import s3_client
from unlearn.data.storage import Storage
from unlearn.errors import CertificateError, ReleaseError
from unlearn.models import tensor_files
from unlearn.releases import files, gate, pointer, publish, rejection, verification
from unlearn.releases.store import Store


def test_a_release_holds_the_model_its_evidence_and_what_it_serves(place, tmp_path, signer, public):
    store = Store(f"{place}/store")
    run = finished(f"{place}/run", audit={"membership": {"unlearned": {"auc": 0.51}}})
    rules = gate.parse({"metrics.unlearned.forget.cosine": {"max": 0.5, "base": {"max": -0.3}}})
    outcome = publish.publish(run, store, signer, ["b" * 64, "a" * 64, "a" * 64], rules)
    assert (
        outcome.new
        and outcome.release.version == "v1"
        and outcome.folder == f"{store.storage.uri}/{outcome.release.folder}"
    )
    release = verification.verify(outcome.folder, public)
    assert release == outcome.release == store.release("v1") and release.requests == ["a" * 64, "b" * 64]
    assert (
        release.base.weights == "0" * 64
        and release.parent is None
        and release.data == {"retain": "1" * 64, "forget": "2" * 64}
    )
    assert release.gate.passed and [check.judged for check in release.gate.checks] == [0.4, pytest.approx(-0.5)]
    folder = Storage(outcome.folder)
    assert folder.files() == ["audit.json", "certificate.json", "config.yaml", "metrics.json", "model/model.json",
                              "model/weights.safetensors", "release.json"]  # fmt: skip
    assert folder.read("model/weights.safetensors") == Storage(run).read("model/weights.safetensors")
    assert folder.read("certificate.json") == store.storage.read("certificates/v1.json")
    assert json.loads(folder.read("release.json"))["version"] == "v1"
    assert any("audit.json" in sentence for sentence in release.claimed) and any(
        "proof" in s for s in release.not_claimed
    )
    assert pointer.read(store).version is None, "publishing moves no pointer"
    # the folder stands for itself, wherever it is
    with_links = tmp_path / "copied"
    for name in folder.files():
        Storage(str(with_links)).write(name, folder.read(name))
    assert verification.verify(str(with_links), public) == release
    again = publish.publish(run, store, signer, ["a" * 64, "b" * 64], rules)
    assert not again.new and again.release == release and len(store.releases()) == 1


def test_the_first_of_two_publishers_wins(place, signer, public):
    store = Store(f"{place}/store")
    runs = [finished(f"{place}/run-{n}", n) for n in range(2)]
    start, ended = threading.Barrier(2), {}

    def one(run: str) -> None:
        try:
            ended[run] = publish.publish(run, Store(store.storage.uri), signer, check=start.wait).release.version
        except ReleaseError as e:
            ended[run] = str(e)

    threads = [threading.Thread(target=one, args=[run]) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(text[:2] for text in ended.values()) == ["v1", "v1"]
    loser, winner = sorted(runs, key=lambda run: len(ended[run]), reverse=True)
    assert ended[winner] == "v1" and "v1 was published meanwhile by somebody else" in ended[loser]
    (release,) = store.releases()
    assert release.weights == weights_of(winner)
    verification.verify(store.folder(release).uri, public)
    assert {name.partition("/")[0] for name in store.storage.files()} == {"certificates", release.folder}
    assert publish.publish(loser, store, signer).release.version == "v2"


def test_two_publishers_of_the_same_make_one_release(store, tmp_path, signer):
    run, start, folders = finished(str(tmp_path / "run")), threading.Barrier(2), []

    def one() -> None:
        folders.append(publish.publish(run, Store(store.storage.uri), signer, check=start.wait).folder)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2 and len(set(folders)) == 1 and len(store.releases()) == 1


def killed(call, at: int) -> bool:
    """Run a call in a process that kills itself at its write number `at`, alternately before it and in its middle;
    whether it was."""
    process = os.fork()
    if process == 0:  # pragma: no cover
        s3_client.client.cache_clear()
        count, real = [0], {name: getattr(Storage, name) for name in ("create", "write", "writing")}

        def counted(name):
            def act(self, *arguments, **named):
                count[0] += 1
                if count[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if count[0] == at - 1 and name == "writing" and self.is_local():
                    context = real[name](self, *arguments)
                    context.__enter__().write_bytes(b"half")
                    os.kill(os.getpid(), signal.SIGKILL)
                return real[name](self, *arguments, **named)

            return act

        for name in real:
            setattr(Storage, name, counted(name))
        try:
            call()
        finally:
            os._exit(0)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.WIFSIGNALED(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    raise AssertionError("the publisher hangs")


def test_killed_anywhere_it_leaves_no_release_or_a_whole_one(place, signer, public):
    run, at, seen = finished(f"{place}/run"), 0, set()
    points = range(1, 40) if not place.startswith("s3://") else (6, 7)  # before and after the certificate
    for at in points:
        store = Store(f"{place}/store-{at}")
        if not killed(lambda: publish.publish(run, store, signer, ["a"]), at):  # noqa: B023  called at once
            break
        left = store.releases()
        seen.add(len(left))
        for release in left:
            pointer.promote(store, release.version)  # which completes it
        outcome = publish.publish(run, store, signer, ["a"])
        assert outcome.release.version == "v1" and outcome.new is not bool(left)
        verification.verify(outcome.folder, public)
        # and what was left behind is gone, half a file that is hidden too
        there = {name.partition("/")[0] for name in files.listing(store.storage)} - {"current.json"}
        assert there - {".current.json.lock"} == {"certificates", outcome.release.folder}
    assert seen == {0, 1}, "some were killed before the certificate, some after"


def test_evidence_of_another_model_is_refused(store, tmp_path, signer):
    def refused(change, **about) -> str:
        run = finished(str(tmp_path / str(len(list(tmp_path.iterdir())))), **about)
        change(Path(run))
        with pytest.raises(ReleaseError) as told:
            publish.publish(run, store, signer)
        assert store.storage.files() == []
        return str(told.value)

    def edit(name: str, **changes):
        def change(run: Path) -> None:
            (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | changes))

        return change

    other = "f" * 64
    assert "figures are of other weights" in refused(edit("metrics.json", weights={"unlearned": other}))
    assert "under another configuration" in refused(edit("metrics.json", config_hash=other))
    assert "not of the weights" in refused(lambda run: None, audit={"weights": {"unlearned": other}})
    assert "not the configuration that the model was trained with" in refused(
        edit("model/model.json", config_hash=other)
    )
    assert "config.yaml is not the configuration" in refused(
        lambda run: (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("steps: 4", "steps: 5"))
    )
    assert "is not the file that model.json and metrics.json speak of" in refused(
        lambda run: tensor_files.save({}, run / "model/weights.safetensors") and None
    )
    assert "no metrics.json there" in refused(lambda run: (run / "metrics.json").unlink())
    assert "no trained model" in refused(lambda run: (run / "model/model.json").unlink())
    assert "holds no JSON object" in refused(lambda run: (run / "metrics.json").write_text("[]"))
    with pytest.raises(ReleaseError, match="a commitment is one word"):
        publish.publish(finished(str(tmp_path / "run")), store, signer, ["two words"])


def test_the_average_of_the_weights_is_released_where_it_was_measured(store, tmp_path, signer):
    run = Path(finished(str(tmp_path / "run"), 1))
    (run / "model").rename(run / "model_ema")
    other = Path(finished(str(tmp_path / "other"), 2))
    (other / "model").rename(run / "model")
    averaged = json.loads((run / "model_ema/model.json").read_text())["sha256"]
    assert publish.publish(str(run), store, signer).release.weights == averaged != weights_of(str(run))


def test_a_release_names_no_person_and_no_image(store, tmp_path, signer):
    run = finished(str(tmp_path / "run"), ids=["img-1", "img-2"], subjects=["Ada Lovelace"])
    outcome = publish.publish(run, store, signer)
    everything = b"".join(store.storage.read(name) for name in store.storage.files())
    assert b"img-1" not in everything and b"Lovelace" not in everything and b"(2 withheld)" in everything
    assert outcome.release.withheld == ["data.forget.ids", "data.forget.subjects"]


def test_a_rejected_candidate_is_kept_apart_with_its_reasons(store, tmp_path, signer):
    run = finished(str(tmp_path / "run"), forget=0.8)
    rules = gate.parse(
        {"metrics.unlearned.forget.cosine": {"max": 0.5}, "metrics.unlearned.retain.cosine": {"min": 0.1}}
    )
    outcome = publish.publish(run, store, signer, ["a"], rules)
    assert outcome.release is None and not outcome.verdict.passed and store.releases() == []
    (reason,) = outcome.verdict.reasons
    assert (reason.figure, reason.value, reason.max, reason.why) == (
        "metrics.unlearned.forget.cosine",
        0.8,
        0.5,
        "above",
    )
    assert publish.publish(run, store, signer, ["a"], rules).folder == outcome.folder
    (about,) = rejection.kept(store)
    assert (
        about["folder"] == outcome.folder
        and about["requests"] == ["a"]
        and about["gate"] == outcome.verdict.model_dump()
    )
    assert Storage(outcome.folder).read("model/weights.safetensors") == Storage(run).read("model/weights.safetensors")
    assert publish.publish(run, store, signer, ["a"]).release.version == "v1", "without the gate it may be released"


def test_a_parent_that_was_changed_judges_nothing(store, tmp_path, signer):
    first = publish.publish(finished(str(tmp_path / "1"), 1), store, signer)
    pointer.promote(store, "v1")
    path = Path(first.folder, "metrics.json")
    path.write_text(path.read_text().replace("0.4", "0.3"))
    rules = gate.parse({"metrics.unlearned.forget.cosine": {"parent": {"max": 0.1}}})
    with pytest.raises(ReleaseError, match="was changed after v1 was published"):
        publish.publish(finished(str(tmp_path / "2"), 2), store, signer, rules=rules)


def test_a_second_signature_of_the_model_is_checked_by_its_own_tool(place, tmp_path, signer, public):
    cli = pytest.importorskip("model_signing._cli", reason="pip install 'unlearn[signing]'")
    from click.testing import CliRunner

    own, handed_out = elliptic_keys(tmp_path)
    outcome = publish.publish(finished(f"{place}/run"), Store(f"{place}/store"), signer, model_key=own)
    assert verification.verify(outcome.folder, public).files["model.sig"].bytes > 0, "the certificate covers it"
    copied = Storage(str(tmp_path / "copied"))
    for name, folder in ((name, Storage(outcome.folder)) for name in outcome.release.files):
        copied.write(name, folder.read(name))

    def checked():
        arguments = ["verify", "key", f"{copied.uri}/model", "--signature", f"{copied.uri}/model.sig"]
        return CliRunner().invoke(cli.main, [*arguments, "--public_key", handed_out])

    assert checked().exit_code == 0, checked().output
    copied.write("model/model.json", b"{}")
    assert checked().exit_code != 0 and "model.json" in checked().output
    certificate.generate(str(tmp_path / "ed25519"))  # which its format does not know
    for path, why in ((tmp_path / "ed25519.key", "elliptic-curve"), (tmp_path / "none.key", "No such file")):
        with pytest.raises(CertificateError, match=why):
            publish.publish(finished(f"{place}/other", 2), Store(f"{place}/store"), signer, model_key=str(path))
    assert len(Store(f"{place}/store").releases()) == 1
