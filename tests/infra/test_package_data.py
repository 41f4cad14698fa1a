"""What is installed holds every file beside the code that the code reads."""

import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_file_beside_the_code_is_in_the_package():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    found = subprocess.run(["git", "ls-files", *wanted], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    packed = {path for package, patterns in wanted.items() for p in patterns for path in (ROOT / package).glob(p)}
    assert [name for name in found.splitlines() if not name.endswith(".py") and ROOT / name not in packed] == []
