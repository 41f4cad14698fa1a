"""The cycle by a schedule where there is no Kubeflow: the CronJob of infra/kubernetes, and the timer of
infra/systemd."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from unlearn.cli.app import app

INFRA = Path(__file__).parents[2] / "infra"
FOLDER = INFRA / "kubernetes/components/cycle"


@pytest.fixture(scope="module")
def documents() -> dict[str, dict]:
    """By kind: the component's own files, as they stand."""
    names = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    return {d["kind"]: d for name in names for d in yaml.safe_load_all((FOLDER / name).read_text())}


@pytest.fixture(scope="module")
def job(documents) -> dict:
    return documents["CronJob"]["spec"]["jobTemplate"]["spec"]


def understood(words: list[str]) -> bool:
    """Whether `unlearn WORDS` is a command with these options; nothing is run."""
    import typer

    command = typer.main.get_command(app)
    context = command.make_context("unlearn", list(words), resilient_parsing=True)
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, list(rest), parent=context)
    return not context.args


def test_the_manifests_are_valid_to_the_last_field(documents):
    validate = pytest.importorskip("kubernetes_validate", reason="pip install 'unlearn[dev]'")
    assert set(documents) == {"ServiceAccount", "RoleBinding", "NetworkPolicy", "CronJob"}
    for document in documents.values():
        validate.validate(document, "1.37", strict=True)
        assert document["metadata"]["namespace"] == "unlearn"
    with pytest.raises(Exception, match="concurencyPolicy"):
        validate.validate(documents["CronJob"] | {"spec": {"concurencyPolicy": "Forbid"}}, "1.37", strict=True)


def test_one_cycle_at_a_time_and_none_caught_up_on(documents, job):
    spec = documents["CronJob"]["spec"]
    assert (
        spec["concurrencyPolicy"] == "Forbid"
        and spec["timeZone"] == "Etc/UTC"
        and spec["startingDeadlineSeconds"] <= 3600
    )
    [rule] = job["podFailurePolicy"]["rules"]
    [container] = job["template"]["spec"]["containers"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [3]}


def test_its_pod_keeps_to_the_restricted_standard(documents, job):
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"] == {
        "type": "RuntimeDefault"
    }
    context = container["securityContext"]
    assert (
        context["readOnlyRootFilesystem"]
        and not context["allowPrivilegeEscalation"]
        and context["capabilities"] == {"drop": ["ALL"]}
    )
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    labels = documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    assert labels.items() <= job["template"]["metadata"]["labels"].items()
    assert (
        documents["RoleBinding"]["subjects"][0]["name"]
        == pod["serviceAccountName"]
        == documents["ServiceAccount"]["metadata"]["name"]
    )
    # The role is one of base, and there.
    accounts = list(yaml.safe_load_all((INFRA / "kubernetes/base/accounts.yaml").read_text()))
    assert documents["RoleBinding"]["roleRef"]["name"] in [
        d["metadata"]["name"] for d in accounts if d["kind"] == "Role"
    ]
    # No secret has a value here; the key that signs is a file.
    variables = {e["name"]: e for e in container["env"]}
    assert "valueFrom" in variables["UNLEARN_LEDGER"]
    [mount] = [m for m in container["volumeMounts"] if m["name"] == "key"]
    assert variables["UNLEARN_RELEASE_KEY"]["value"].startswith(mount["mountPath"] + "/") and mount["readOnly"]


def test_their_commands_are_understood(job):
    from pipelines import sending

    [container] = job["template"]["spec"]["containers"]
    assert container["command"] == ["python"] and container["args"][:2] == ["-m", "unlearn"]
    words = container["args"][2:]
    assert understood(words) and understood(["cycle", "s3://bucket/unlearn/cycle.yaml"])
    assert sending.parameters([words[words.index("-p") + 1]]) == {"overlay": "gpu"}
    with pytest.raises(Exception, match="No such option"):
        understood(["pipeline", "run", "x.yaml", "--locally"])
    unit = (INFRA / "systemd/unlearn-cycle.service").read_text()
    assert understood(shlex.split(re.search(r"^ExecStart=\S+ -m unlearn (.*)$", unit, re.M)[1]))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_the_units_are_what_systemd_wants(tmp_path):
    for path in (INFRA / "systemd").iterdir():  # whose program need not be installed here
        (tmp_path / path.name).write_text(path.read_text().replace("/opt/unlearn/.venv/bin/python", "/bin/true"))

    def verified() -> str:
        made = subprocess.run(
            ["systemd-analyze", "verify", *map(str, tmp_path.iterdir())], capture_output=True, text=True
        )
        return made.stderr + made.stdout + ("" if made.returncode == 0 else f"exit {made.returncode}")

    assert verified() == ""
    unit = tmp_path / "unlearn-cycle.service"
    unit.write_text(unit.read_text().replace("Type=oneshot", "Type=once"))
    assert "Failed to parse service type" in verified()
