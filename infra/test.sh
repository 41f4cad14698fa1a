#!/usr/bin/env bash
# Installs into .venv with the test tools, then runs the whole suite. Options are pytest's: `-m slow` for the long checks.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup dev
exec .venv/bin/python -m pytest "$@"
