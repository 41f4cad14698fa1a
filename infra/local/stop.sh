#!/usr/bin/env bash
# Ends what infra/local/start.sh started on this machine, jobs included, and nothing else. The token stays for the next start.
source "$(dirname "${BASH_SOURCE[0]}")/node.sh"

[ -n "$(node_processes)" ] || { echo "nothing of infra/local/start.sh runs here"; exit; }
for signal in TERM KILL; do
    node_processes | xargs --no-run-if-empty kill "-$signal" 2>/dev/null || true
    for _ in $(seq 60); do
        [ -n "$(node_processes)" ] || { echo "stopped"; exit; }
        sleep 0.25
    done
done
fail "still there: $(node_processes | xargs)"
