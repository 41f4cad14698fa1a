# shellcheck shell=bash
# Makes .venv in the project root with the pinned packages; sourced by quickstart.sh and test.sh with the extras wanted.
# PYTHON names another interpreter than python3.11. What was installed by the same files before is not installed again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $*" >&2; exit 2; }

python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
[ -n "$python" ] || fail "Python 3.11 or newer is needed: install it, or name it in PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python is older than Python 3.11: name another one in PYTHON"

# A bare version installs torch's CUDA build from PyPI: gigabytes that a machine without a GPU cannot use. Where pip
# finds a CPU build by itself it is taken; else uv fetches it, which knows where CPU builds are.
install_torch_cpu() {
    local torch
    torch=$(grep '^torch==' infra/constraints.txt)
    if .venv/bin/pip install --quiet --dry-run --no-deps --ignore-installed --report - "$torch" 2>/dev/null |
        "$python" -c 'import json, sys; m = json.load(sys.stdin)["install"][0]["metadata"]; sys.exit(any("nvidia" in r for r in m.get("requires_dist", [])) and "+cpu" not in m["version"])'; then
        .venv/bin/pip install --quiet "$torch"
    else
        .venv/bin/pip install --quiet uv==0.13.9
        .venv/bin/uv pip install --quiet --python .venv --torch-backend=cpu "$torch" "$(grep '^torchvision==' infra/constraints.txt)"
    fi
}

setup() {
    local extras=$1 stamp
    stamp=".venv/.installed-$(cat pyproject.toml infra/constraints.txt infra/setup.sh | sha256sum | cut -c1-16)${extras:+-$extras}"
    if [ -e "$stamp" ]; then return; fi
    echo "Installing into .venv (once, some minutes) ..." >&2
    [ -x .venv/bin/pip ] || "$python" -m venv .venv
    if ! nvidia-smi -L >/dev/null 2>&1; then install_torch_cpu; fi
    .venv/bin/pip install --quiet --constraint infra/constraints.txt --editable ".${extras:+[$extras]}"
    touch "$stamp"
}
