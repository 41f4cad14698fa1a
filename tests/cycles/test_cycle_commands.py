"""`unlearn cycle`: what it says, how it exits, and what it shows."""

import base64
import json
import re
import signal
from pathlib import Path

import pytest
import yaml
from support.cycles import LIMIT, ask, standing, written
from support.webhooks import receiving

from jobs import cycle as job
from unlearn import certificate, signals
from unlearn.cli import cycles
from unlearn.cycles import cycle_file
from unlearn.errors import ConfigError
from unlearn.releases.store import Store


@pytest.fixture(scope="module")
def due(made):
    """A cycle that no rung can pass."""
    return made(gate={LIMIT: {"min": 2.0}})


def test_it_says_what_was_served_and_shows_it(cycle, told):
    path = written(cycle)
    unaudited = "gate={audit.membership.unlearned.auc: {max: 0.6}}"
    code, out, err = told("cycle", path, "--set", unaudited)
    assert (code, out) == (0, "nothing to serve: no request is open\n") and "the cycle has no `audit`" in err
    ask(cycle, {"subjects": ["person-1"]}, {"ids": ["img-003", "img-999"]}, {"subjects": ["nobody"]})
    code, out, err = told("cycle", path, "--delete-rows", str(cycle.cycle_dir) + "-kept")
    assert code == 0 and "person" not in out + err and "img-" not in out + err
    assert (
        "no image meets request(s) 3: they stay open" in out
        and "met in part only: request(s) 2 (1 of its values)" in out
    )
    assert re.search(r"v1, now current: cycle \w{12} has served request\(s\) 1, 2\n", out)
    assert re.search(r"shards without 11 rows: .*; to be deleted: 5 objects", out)
    assert "nothing to serve: no open request meets an image" in told("cycle", path)[1]

    (shown,) = json.loads(told("cycle", "show", path, "--json")[1])
    assert shown["ended"] == "v1, made current" and shown["figures"]["forget_new"]["unlearned"]["psnr"] > 0
    assert re.search(rf"{shown['id']} .* 2 +0 +1 +v1, made current", told("cycle", "show", path)[1])
    one = told("cycle", "show", path, shown["id"])[1]
    assert "rung 0  passed, beside no release" in one and LIMIT in one and "shard-2.parquet" in one
    code, _, err = told("cycle", "show", path, "0" * 12)
    assert code == 2 and "has no cycle 000000000000" in err
    assert told("cycle", "report", path, "--key", cycle.key.replace(".key", ".pub"))[0] == 0
    other = certificate.generate(f"{cycle.key}-other")[0]
    code, out, err = told("cycle", "report", path, "--key", other)
    assert code == 2 and out.startswith("report: ") and f"v1 cannot be verified with {other}: the page says why" in err
    assert "NOT verified: " in Path(cycle.cycle_dir, "history.html").read_text()


def test_requests_that_the_current_release_does_not_serve_are_told(cycle, told):
    path, store = written(cycle), ("--store", cycle.releases)
    ask(cycle, {"subjects": ["person-1"]})
    assert "were served" not in told("cycle", path)[2]
    ask(cycle, {"subjects": ["person-2"]})
    code, out, err = told("cycle", path, "--set", "promote=false")
    assert re.search(r"v2, not made current: cycle \w{12} has served request\(s\) 2\n", out) and code == 0
    promote = "request(s) 2 were served, but not by the current release, which is v1: `unlearn release promote v2`"
    assert promote in err
    (request,) = set(Store(cycle.releases).release("v2").requests) - set(Store(cycle.releases).release("v1").requests)
    told("release", "promote", "v2", *store)
    out = told("release", "rollback", "v1", *store, "--force", "--reason", "x")[1]
    assert f"current: v1\nnot served by it: request {request[:16]}; v2 serves it\n" in out
    out = told("release", "withdraw", "v2", *store, "--reason", "x")[1]
    assert f"request {request[:16]}; no release that is not withdrawn serves it\n" in out
    code, out, err = told("cycle", path)
    assert code == 0 and "no request is open" in out and "request(s) 2 were served, but not by the current" in err
    assert "no release serves them that is not withdrawn" in err
    ask(cycle, {"subjects": ["person-2"]})
    code, out, err = told("cycle", path)
    assert "v3, now current" in out and "were served" not in err, "what nobody served any more is served again"


def test_a_place_that_cannot_be_written_is_told_before_anything_is_trained(cycle, told, tmp_path):
    ask(cycle, {"subjects": ["person-1"]})
    (tmp_path / "file").touch()
    for given in (("--set", f"releases={tmp_path}/file/releases"), ("--delete-rows", tmp_path / "file" / "kept")):
        code, _, err = told("cycle", written(cycle), *given)
        assert code == 2 and re.search(rf"{tmp_path}/file/\w+ cannot be written: {tmp_path}/file is a file", err)
    assert "0 cycles" in "".join(map(str, told("cycle", "show", written(cycle)))), "nothing was begun"


def test_it_exits_with_3_where_retraining_is_due(due, told):
    ask(due, {"subjects": ["person-1"]})
    for _ in range(2):
        code, out, _ = told("cycle", written(due))
        assert code == 3 and re.search(
            r"retraining is due: no rung of cycle \w{12} passed the gate; request\(s\) 1 stay open", out
        )
    text = told("cycle", "metrics", written(due))[1]
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert (
        samples['unlearn_requests{state="received"}'] == "1"
        and samples['unlearn_cycles{cycle="cycle",outcome="retraining_due"}'] == "1"
    )
    assert samples['unlearn_gate_verdicts{cycle="cycle",verdict="refused"}'] == "1"
    assert samples['unlearn_last_cycle_released{cycle="cycle"}'] == "0"
    assert float(samples['unlearn_last_cycle_timestamp_seconds{cycle="cycle"}']) > 1.7e9
    assert all(
        re.fullmatch(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.]+', f"{k} {v}") for k, v in samples.items()
    )


def test_a_webhook_tells_of_the_last_cycle_and_its_verdicts(due, told, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "secret").write_text(base64.b64encode(bytes(32)).decode())
    with receiving() as (url, _, came):
        assert (
            told("cycle", "notify", written(due), url, "--secret-file", tmp_path / "secret")[1] == "sent at attempt 1\n"
        )
    [(headers, body)] = came
    content = json.loads(body)
    assert headers["webhook-signature"].startswith("v1,") and b"person-1" not in body
    assert (content["type"], content["cycle"], content["pending"]) == ("cycle", "cycle", 1)
    last = content["last"]
    assert last["retraining_due"] and last["release"] is None and last["requests"] == [1] and last["ended"]
    [verdict] = last["verdicts"]
    assert (verdict["rung"], verdict["passed"], verdict["parent"]) == (0, False, None)
    assert verdict["reasons"][0].startswith(LIMIT) and "below min 2" in verdict["reasons"][0]


def test_of_two_at_once_the_second_yields(cycle, told):
    beside = cycle.model_copy(update={"cycle_dir": f"{cycle.cycle_dir}-2"})  # with the same ledger and releases
    with job.owned(cycle, "cycle"):
        for other, place in ((cycle, cycle.cycle_dir), (beside, cycle.releases)):
            code, _, err = told("cycle", written(other))
            assert code == 2 and f"{place} is in use by `unlearn cycle`" in err and "run_dir" not in err
    assert told("cycle", written(beside))[0] == 0


def test_how_to_go_on_is_told_with_all_that_was_given(cycle, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "select", lambda cycle: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(signals, "listen", lambda: None)
    before = signal.signal(signal.SIGTERM, signals._raise)
    try:
        with pytest.raises(signals.Stopped) as stopped:
            cycles.start(written(cycle), ["promote=false", "releases=a b"], "kept")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.hint.endswith(
        f"unlearn cycle {written(cycle)} --set promote=false --set 'releases=a b' --delete-rows kept"
    )


def test_a_missing_key_is_told_before_anything_is_trained(cycle, told, monkeypatch):
    monkeypatch.delenv("UNLEARN_RELEASE_KEY", raising=False)
    ask(cycle, {"subjects": ["person-1"]})
    code, _, err = told("cycle", written(cycle), "--set", "key=null")
    assert code == 2 and "no key signs the releases" in err
    code, _, err = told(
        "cycle", written(cycle), "--set", f"model_key={cycle.key}"
    )  # of the kind that signs certificates
    assert code == 2 and ("is no private elliptic-curve key" in err or "pip install 'unlearn[signing]'" in err)
    assert standing(cycle) == {1: "received"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ledger": "postgresql://unlearn:hush@db/ledger"}, "ledger: a password does not belong here"),
        ({"ledger": "postgresql://db/ledger?user=u&password=hush"}, "ledger: a password does not belong here"),
        ({"ladders": []}, "unknown key; did you mean ladder"),
        ({"run": {"data": {"train": "x"}, "training": {"steps": 1}}}, "run: model.weights is missing"),
        ({"set": {"data.retain": {"limit": 5}}}, "data.retain is not to be set"),
        ({"set": {"evaluation.oracle": "x"}}, "evaluation.oracle is not to be set"),
        ({"set": {"method.name": "pretrain"}}, "method pretrain forgets nothing"),
        ({"set": {"training.stepz": 5}}, "training.stepz: unknown key; did you mean steps"),
        ({"ladder": [{}]}, "rung 1: it changes nothing"),
        ({"ladder": [{"training.steps": 2}]}, "rung 1: it would make the same model as the run as it stands"),
        ({"ladder": [{"evaluation.limit": 5}]}, "evaluation.limit is not to be set: every rung is measured alike"),
        ({"ladder": [{"data": {"forget": {}}}]}, "rung 1: data is not to be set"),
        ({"ladder": [{"method.alpha": "x"}]}, "ladder, rung 1: method.alpha: "),
        ({"gate": {"metrics.x": {"mix": 1}}}, "metrics.x.mix: unknown key"),
        ({"gate": {"metrics.unlearned.retain.cosin": {"min": 0}}}, "did you mean metrics.unlearned.retain.cosine?"),
        (
            {"gate": {"metrics.unlearned.forgt.psnr": {"min": 0, "optional": True}}},
            "no cycle measures this; did you mean",
        ),
        (
            {"gate": {"metrics.oracle.retain.cosine": {"min": 0}}},
            "metrics.oracle.retain.cosine: no cycle measures this",
        ),
        ({"gate": {LIMIT: {"oracle": {"min": 0}}}}, f"{LIMIT}: oracle: no oracle knows what a cycle forgets"),
        ({"gate": {"metrics.unlearned.forget_old.psnr": {"max": 9}}}, "no requests from before: add `optional: true`"),
        ({"gate": {"metrics.unlearned.retain.lpips": {"max": 9}}}, "LPIPS is not measured"),
        ({"gate": {LIMIT: 0.5}}, f"{LIMIT}: expected limits, as in {{max: 0.6}}"),
        ({"gate": "nowhere.yaml"}, "gate: there is no file nowhere.yaml"),
        ({"run": "nowhere.yaml"}, "run: there is no file nowhere.yaml"),
    ],
)
def test_a_mistake_in_the_file_is_told(cycle, changes, told):
    tree = yaml.safe_load(cycle_file.dump(cycle)) | changes
    with pytest.raises(ConfigError) as raised:
        cycle_file.parse(tree, "cycle.yaml")
    assert told in str(raised.value) and "hush" not in str(raised.value)


def test_the_file_is_read_as_it_was_written(cycle):
    assert cycle_file.load(written(cycle)) == cycle
    changed = cycle_file.load(written(cycle), ["promote=false", "run.training.steps=7"])
    assert not changed.promote and changed.settings(0).training.steps == 7 and changed.identity() != cycle.identity()
