"""The client of Kubeflow Pipelines, against the released REST description over HTTP; and when a schedule comes due."""

import json
import sys
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
import yaml
from support.cycles import tiny_cycle
from support.kubeflow_server import serving
from support.tls import self_signed

from pipelines import cron, schedule
from pipelines.kubeflow import Kubeflow
from unlearn.cycles import cycle_file
from unlearn.errors import ClusterError, ConfigError

pytest.importorskip("kfp", reason="pip install 'unlearn[pipelines]'")
UTC = ZoneInfo("UTC")
PLACE = (
    "--mounted", "--image", "registry.example.com/unlearn:1", "--key", "unlearn-cycle/releases.key",
    "--secret", "UNLEARN_LEDGER=unlearn-cycle/ledger",
)  # fmt: skip


@pytest.fixture
def kubeflow(monkeypatch):
    monkeypatch.setenv("UNLEARN_KFP_TOKEN", "t0ken-of-the-tests")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("kfp.client.client.Client._LOCAL_KFP_CONTEXT", "/nowhere")  # a developer's own settings
    with serving("t0ken-of-the-tests") as server:
        yield server
    assert server.broken == []


@pytest.fixture
def source(tmp_path, tiny_shards, tiny_model):
    """A cycle's file whose key and ledger come from Secrets."""
    path = tmp_path / "cycle.yaml"
    tree = yaml.safe_load(cycle_file.dump(tiny_cycle(tmp_path, tiny_shards, tiny_model)))
    path.write_text(yaml.safe_dump({name: value for name, value in tree.items() if name not in ("key", "ledger")}))
    return str(path)


@pytest.mark.parametrize(
    "expression, first",
    [
        ("0 0 3 * * *", "2026-11-26 03:00:00"),
        ("30 */20 * * * *", "2026-11-26 01:00:30"),
        ("0 15 10 ? * MON-FRI", "2026-11-26 10:15:00"),
        ("0 0 0 1,15 * ?", "2026-12-01 00:00:00"),
        ("0 0 3 * 2/5 0", "2026-12-06 03:00:00"),
    ],
)
def test_when_a_schedule_comes_due(expression, first):
    times = cron.upcoming(expression, UTC, after=datetime(2026, 11, 26, 0, 50, tzinfo=UTC))
    assert f"{times[0]:%Y-%m-%d %H:%M:%S}" == first and times == sorted(times) and len(set(times)) == 3


@pytest.mark.parametrize(
    "expression, why",
    [
        ("0 3 * * *", "5 fields"),  # Kubeflow would read it as every hour
        ("0 0 3 * * 7", "day of week 7: give 0 to 6"),  # which crontab calls Sunday
        ("0 60 3 * * *", "minute 60"),
        ("0 0 22-2 * * *", "goes backwards"),
        ("0 0 3 L * *", "none of"),
        ("0 0 ? * * *", "stands alone"),
        ("0 0 3 1 * 1", "not both"),
        ("0 0 3 */2 * MON", "not both"),
        ("0 0 3 30 2 *", "no such day"),
        ("0 */0 3 * * *", "a step is"),
        ("@daily", "1 fields"),
    ],
)
def test_what_kubeflow_would_read_otherwise_is_refused(expression, why):
    with pytest.raises(ConfigError, match=why):
        cron.upcoming(expression, UTC)


def test_a_schedule_is_replaced_as_a_whole(kubeflow, told, source):
    def asked(expression="0 0 3 * * *", *more):
        return told("pipeline", "schedule", source, "--cron", expression, "--host", kubeflow.url, *PLACE, *more)

    code, out, _ = asked()
    assert code == 0 and out.count("next: ") == 3 and "03:00:00 UTC" in out
    [made] = kubeflow.recurring.values()
    assert made["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * *"}} and made["mode"] == "ENABLE"
    assert made["no_catchup"] is True and str(made["max_concurrency"]) == "1"
    tasks = made["pipeline_spec"]["pipeline_spec"]["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert tasks["select"]["cachingOptions"] == {}
    sent = made["runtime_config"]["parameters"]["cycle"]
    assert cycle_file.load(sent).name == "cycle" and sent.startswith(cycle_file.load(source).cycle_dir)
    assert "already" in asked()[1] and list(kubeflow.recurring.values()) == [made]
    # Others of that name, over more than a page: a client that died between, or another user.
    for number in range(3):
        kubeflow.CreateRecurringRun(made | {"description": f"{schedule.MARK}old{number}"}, {})
    kubeflow.CreateRecurringRun(made | {"display_name": "another"}, {})
    assert ": scheduled" in asked("0 0 4 * * *")[1]
    left = {r["display_name"]: r["trigger"]["cron_schedule"]["cron"] for r in kubeflow.recurring.values()}
    assert left == {"unlearn-cycle": "0 0 4 * * *", "another": "0 0 3 * * *"} and len(kubeflow.recurring) == 2
    listed = told("pipeline", "schedules", "--host", kubeflow.url)[1]
    assert "unlearn-cycle  0 0 4 * * *  enabled" in listed and "another" in listed
    assert "deleted" in told("pipeline", "unschedule", "--host", kubeflow.url)[1] and len(kubeflow.recurring) == 1
    assert "no such schedule" in told("pipeline", "unschedule", "--host", kubeflow.url)[1]
    operations = kubeflow.operations()
    assert operations.index("RecurringRunService_CreateRecurringRun") < operations.index(
        "RecurringRunService_DeleteRecurringRun"
    )


def test_nothing_is_sent_that_a_cluster_could_not_serve(kubeflow, told, source):
    def refused(*arguments):
        code, _, err = told("pipeline", *arguments, "--host", kubeflow.url)
        assert code == 2 and "Traceback" not in err
        return err

    assert "is a path of this machine" in refused("run", source, *PLACE[1:])
    assert "give --image" in refused("run", source, "--mounted", *PLACE[3:])
    assert "private key" in refused("run", source, *PLACE[:3], *PLACE[5:])
    assert "no ledger" in refused("run", source, *PLACE[:5])
    assert "--memory lots: write a size" in refused("run", source, *PLACE, "--memory", "lots")
    assert "--to mars: give k8s" in refused("run", source, *PLACE, "--to", "mars")
    assert "--ca nowhere: no file" in refused("run", source, *PLACE, "--ca", "nowhere")
    assert "--parameter x=1" in refused("run", source, *PLACE, "-p", "x=1")
    assert "goes backwards" in refused("schedule", source, *PLACE, "--cron", "0 0 5-3 * * *")
    assert "--timezone Mars" in refused("schedule", source, *PLACE, "--cron", "0 0 3 * * *", "--timezone", "Mars")
    assert not {"CreateRun", "CreateRecurringRun"} & {name.partition("_")[2] for name in kubeflow.operations()}


def test_what_does_not_keep_to_the_description_is_refused():
    with serving() as server:
        made = {"display_name": "x", "mode": "ENABLE", "max_concurency": 1}
        path = "/apis/v2beta1/recurringruns"
        assert (
            server.answer("POST", path, {}, json.dumps(made).encode())[0] == 400
            and "max_concurency" in server.broken[0]
        )
        assert (
            server.answer("GET", f"{path}?experiment=1", {}, b"")[0] == 400
            and server.answer("PUT", path, {}, b"")[0] == 404
        )


def test_without_the_extra(told, source, monkeypatch):
    monkeypatch.setitem(sys.modules, "kfp", None)
    for command in (["compile", "-o", "x.yaml"], ["run", source, "--local"], ["schedules", "--host", "http://x"]):
        code, _, err = told("pipeline", *command)
        assert code == 2 and "pip install 'unlearn[pipelines]'" in err


def test_a_run_is_started_and_watched(kubeflow, told, source):
    code, out, err = told(
        "pipeline", "run", source, "--host", kubeflow.url, *PLACE, "--to", "http://ray-head:8265", "--account", "cycle"
    )
    assert code == 0, err
    id = out.strip()
    run = kubeflow.runs[id]
    assert run["runtime_config"]["parameters"]["to"] == "http://ray-head:8265" and run["service_account"] == "cycle"
    assert "t0ken" not in json.dumps(kubeflow.calls)

    def at(state, **tasks):
        details = [
            {"run_id": id, "task_id": name, "display_name": name, "state": s, "create_time": f"2026-11-26T03:0{n}:00Z"}
            for n, (name, s) in enumerate(tasks.items())
        ]
        return {"state": state, "run_details": {"task_details": details}}

    kubeflow.states[id] = [
        at("RUNNING", select="RUNNING"),
        at("RUNNING", select="SUCCEEDED", unlearn="RUNNING"),
        at("CANCELED", unlearn="FAILED"),
    ]
    lines = []
    assert Kubeflow(kubeflow.url).watch(id, lines.append, every=0.01) == "CANCELED"
    assert lines == [
        f"run {id}: running", "select: running", "select: succeeded", "unlearn: running", f"run {id}: canceled",
        "unlearn: failed",
    ]  # fmt: skip
    assert told("pipeline", "watch", id, "--host", kubeflow.url)[0] == 1
    kubeflow.states[id] = [at("SUCCEEDED")]
    assert told("pipeline", "watch", id, "--host", kubeflow.url)[0] == 0
    assert "not found (404)" in told("pipeline", "watch", "nobody", "--host", kubeflow.url)[2]


def test_tokens(kubeflow, told, monkeypatch, tmp_path):
    file = tmp_path / "token"
    file.write_text("t0ken-of-the-tests\n")
    monkeypatch.setenv("UNLEARN_KFP_TOKEN", "wr0ng")
    code, out, err = told("pipeline", "schedules", "--host", kubeflow.url)
    assert code == 2 and "UNLEARN_KFP_TOKEN_FILE" in err and "wr0ng" not in out + err
    assert told("pipeline", "schedules", "--host", kubeflow.url, "--token-file", file)[0] == 0
    server = Kubeflow(kubeflow.url, token_file=str(file))
    assert schedule.schedules(server) == []
    kubeflow.token = "anew"  # a pod's token is replaced while a run is watched
    with pytest.raises(ClusterError, match="expired"):
        schedule.schedules(server)
    file.write_text("anew")
    assert schedule.schedules(server) == []
    assert "is empty" in told("pipeline", "schedules", "--host", kubeflow.url, "--token-file", "/dev/null")[2]


def test_a_certificate_that_is_not_trusted_is_told(told, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    certificate = self_signed(tmp_path)
    with serving(certificate=certificate) as server:
        code, _, err = told("pipeline", "schedules", "--host", server.url)
        assert code == 2 and "its certificate is not trusted: give the authority's with --ca" in err
        assert told("pipeline", "schedules", "--host", server.url, "--ca", certificate[0])[0] == 0


def test_nobody_answers(told):
    code, _, err = told("pipeline", "schedules", "--host", "http://127.0.0.1:9")
    assert code == 2 and "nobody answers" in err and "Traceback" not in err
    assert "give a URL" in told("pipeline", "schedules", "--host", "kubeflow")[2]
