#!/usr/bin/env bash
# Installs into .venv with the test tools, then infra/check.sh and the whole suite. Options are pytest's: `-m slow` for the long checks.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup dev
bash infra/check.sh
# Three processes, a file to each at a time (see tests/conftest.py): most of the long tests wait for other processes to start.
exec .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
