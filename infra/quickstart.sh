#!/usr/bin/env bash
# From nothing to a report: installs into .venv, then runs `unlearn demo`. Options are the demo's.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup ""
exec .venv/bin/unlearn demo "$@"
