#!/usr/bin/env bash
# Everything about the code that needs no run of it: format, lint, types, direction of imports, shell scripts.
# `bash infra/check.sh --fix` formats, and mends what can be mended automatically.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=$PWD/.venv/bin

quiet() {
    local output
    output=$("$@" 2>&1) || { echo "$output" >&2; echo "error: $(basename "$1") found something" >&2; exit 1; }
}

if [ "${1:-}" = --fix ]; then
    "$bin/ruff" check --quiet --fix
    "$bin/ruff" format --quiet
fi
"$bin/ruff" format --check --quiet || { echo "error: some files are not formatted: bash infra/check.sh --fix" >&2; exit 1; }
quiet "$bin/ruff" check
quiet "$bin/lint-imports" --no-cache
git ls-files '*.sh' .ci/run | while read -r script; do quiet "$bin/shellcheck" --external-sources --source-path=SCRIPTDIR "$script"; done
quiet "$bin/pyright" --pythonpath "$bin/python"
