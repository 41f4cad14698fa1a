#!/usr/bin/env bash
# Installs into .venv with the test tools, then infra/check.sh and the whole suite. Options are pytest's: `-m slow` for the long checks.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup dev
bash infra/check.sh
exec .venv/bin/python -m pytest "$@"
