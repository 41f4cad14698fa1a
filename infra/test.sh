#!/usr/bin/env bash
# Installs into .venv with the test tools, then infra/check.sh and the whole suite beside each other. Options are pytest's: `-m slow` for the long checks.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup dev
# Beside the tests, which leave it room: it computes on one core for half a minute.
bash infra/check.sh &
check=$!
failed=0
# Three processes, a file to each at a time (see tests/conftest.py): most of the long tests wait for other processes to start.
.venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@" || failed=$?
wait "$check" || { echo "error: infra/check.sh has failed, see above" >&2; failed=1; }
exit "$failed"
