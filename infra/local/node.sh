# shellcheck shell=bash disable=SC2034
# What start.sh and stop.sh share; sourced by both. One Ray node of a user on a machine; UNLEARN_RAY_HOME makes room for more.
set -euo pipefail

here=${UNLEARN_RAY_HOME:-$HOME/.unlearn/ray}
token=$here/token
log=$here/$(hostname).log  # a HOME may be shared between machines
mark=UNLEARN_RAY=$(hostname):$here

fail() { echo "error: $*" >&2; exit 2; }

# The processes of this node: every one that Ray starts has the mark in its environment, and nothing else has.
node_processes() { grep -lszxF "$mark" /proc/[0-9]*/environ | cut -d/ -f3 || true; }
