"""infra/Dockerfile: linted, and its install steps run as they stand, where no Docker engine is."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
from support.programs import program

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"


def instructions() -> dict[str, list[tuple[str, str]]]:
    """Stage -> its instructions (name, rest of the line), in the Dockerfile's order; "" is what stands before the first
    FROM."""
    text = re.sub(r"^\s*#.*\n", "", (INFRA / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    stages: dict[str, list[tuple[str, str]]] = {"": []}
    for line in filter(str.strip, text.splitlines()):
        name, rest = line.split(maxsplit=1)
        if name == "FROM":
            stages[rest.split(" AS ")[1]] = []
        list(stages.values())[-1].append((name, rest))
    return stages


def chain(stage: str) -> list[str]:
    """The stages a stage stands on, the first one first, and itself."""
    stages, found = instructions(), [stage]
    while (parent := stages[found[0]][0][1].split(" AS ")[0]) in stages:
        found.insert(0, parent)
    return found


def test_hadolint_has_nothing_to_say_of_the_dockerfile():
    found = subprocess.run([program("hadolint"), "--no-color", INFRA / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_final_stages_have_no_compiler_and_run_as_user_1000(target):
    stages, built_in = instructions(), chain(target)
    assert built_in == ["base", target]
    assert not any("build-essential" in rest or "nvcc" in rest for stage in built_in for _, rest in stages[stage])
    assert ("USER", "1000:1000") in stages[target]
    assert stages[target][-1] == ("CMD", '["unlearn", "--help"]')  # no ENTRYPOINT: KubeRay's command takes its place


def test_the_extras_of_the_image_exist():
    default = next(rest for name, rest in instructions()["build"] if name == "ARG" and rest.startswith("EXTRAS="))
    wanted = shlex.split(default)[0].removeprefix("EXTRAS=").split()
    assert set(wanted) <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def context(into: Path) -> None:
    """Copy what .dockerignore lets through, as `docker build` would."""
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    for name in (line[1:] for line in lines if line.startswith("!")):
        source, ignore = ROOT / name, shutil.ignore_patterns("__pycache__")
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, into / name, ignore=ignore) if source.is_dir() else shutil.copy(source, into / name)


def install(stage: str, root: Path) -> None:
    """Run the RUN lines of a stage and of those it stands on, apt-get apart, with `root` in the place of
    /opt/unlearn."""
    base_python = Path(sys._base_executable).parent
    env = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_", "UV_")) or k.lower().endswith("_proxy")}
    env |= {"PATH": f"{base_python}:/usr/local/bin:/usr/bin:/bin", "HOME": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    for name, rest in (line for s in chain(stage)[1:] for line in instructions()[s]):
        rest = rest.replace("/opt/unlearn", str(root))
        if name in ("ARG", "ENV"):
            env |= dict(word.split("=", 1) for word in shlex.split(rest))
        elif name == "COPY" and rest == ". .":
            context(root)
        elif name == "COPY" and not rest.startswith("--from"):
            *names, into = rest.split()
            (root / into).mkdir(exist_ok=True)
            [shutil.copy(ROOT / n, root / into) for n in names]
        elif name == "RUN" and not rest.startswith("apt-get"):
            ran = subprocess.run(
                ["/bin/bash", "-euo", "pipefail", "-c", rest], cwd=root, env=env, capture_output=True, text=True
            )
            assert ran.returncode == 0, f"{rest}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_install_steps_of_the_cpu_image_work_in_a_clean_place():
    with tempfile.TemporaryDirectory(prefix="image-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        install("installed-cpu", root)
        check_installed(root)


def check_installed(root: Path) -> None:
    """What was installed fits together, is pinned, and works for a user who may write nowhere but in HOME and /tmp."""
    python = root / ".venv/bin/python"
    assert subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True).returncode == 0
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True
    ).stdout.split()
    normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()  # noqa: E731
    pinned = {normal(p.split("==")[0]): p.split("==")[1] for p in (INFRA / "constraints.txt").read_text().split()}
    found = {normal(p.split("==")[0]): p.split("==")[1].split("+")[0] for p in listed}
    free = {"pip", "setuptools", "unlearn"} | {
        n for n in found if n.startswith(("nvidia-", "cuda-")) or n == "triton"
    }  # torch pins these
    assert {n: v for n, v in found.items() if n not in free and pinned.get(n) != v} == {}
    code = """
import deepspeed, importlib, pathlib, sys, torch, unlearn.cli, jobs.train
from ray.job_submission import JobSubmissionClient
files = [m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
inside = [f for f in files if f.startswith(sys.prefix) and f.endswith(".py")]
bare = [f for f in inside if not pathlib.Path(importlib.util.cache_from_source(f)).exists()]
assert inside and not bare, bare[:5]
"""
    with tempfile.TemporaryDirectory(prefix="home-") as home:
        os.chmod(home, 0o777)
        user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"] if os.getuid() == 0 else []
        env = {"PATH": f"{root}/.venv/bin:/usr/bin:/bin", "HOME": home, "PYTHONDONTWRITEBYTECODE": "1"}
        for command in ([python, "-c", code], ["unlearn", "--help"], ["ray", "--version"]):
            ran = subprocess.run([*user, *command], env=env, cwd=home, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr[-3000:]
