#!/usr/bin/env bash
# A Ray cluster on this machine, with all its CPUs and GPUs; infra/local/stop.sh ends it.
#
#     infra/local/start.sh                        the head: for this machine alone, on loopback
#     infra/local/start.sh --ip 10.0.0.5          a head that other machines can join, in a network you trust (no TLS)
#     infra/local/start.sh --join 10.0.0.5:6379   on each other machine, with the head's token file in the same place
#
# Whoever wants to talk to it needs the token. The dashboard and the Jobs API listen on loopback; from elsewhere use
# `ssh -L 8265:127.0.0.1:8265`. --port and --dashboard-port choose other ports than 6379 and 8265; all further options
# go to `ray start` behind ours and so win: --num-gpus 4, --object-store-memory BYTES ...
source "$(dirname "${BASH_SOURCE[0]}")/node.sh"

ip='' port=6379 dashboard=8265 join='' more=()
while [ $# -gt 0 ]; do
    if [[ $1 == --@(ip|join|port|dashboard-port)=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case $1 in
    --ip) ip=${2:?--ip needs an address} && shift 2 ;;
    --join) join=${2:?--join needs HOST:PORT} && shift 2 ;;
    --port) port=${2:?--port needs a number} && shift 2 ;;
    --dashboard-port) dashboard=${2:?--dashboard-port needs a number} && shift 2 ;;
    -h | --help) sed -n '2,/^source/{/^#/p}' "${BASH_SOURCE[0]}" | cut -c3- && exit ;;
    *) more+=("$1") && shift ;;
    esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3 || fail "no Python found: run infra/quickstart.sh, or name one in PYTHON")
cd "$root"
"$python" -c 'import aiohttp_cors, ray' 2>/dev/null || fail "$python has no ray[default]: pip install 'unlearn[cluster]'"

umask 077
mkdir -p "$here"
exec 9>"$here/$(hostname).lock"
flock --nonblock 9 || fail "another start.sh is at work"
[ -z "$(node_processes)" ] || { echo "Ray runs already (log: $log); infra/local/stop.sh ends it"; exit; }

if [ ! -s "$token" ]; then
    [ -z "$join" ] || fail "no token in $token: copy that file from the head, readable for you alone"
    "$python" -c 'import secrets; print(secrets.token_hex(32))' >"$token"
fi
chmod 600 "$token"

# Ray's sockets want a short path, and nobody else may have made the folder. Ray makes its own writable for everyone: this one
# lets nobody else in.
temporary=${RAY_TMPDIR:-/tmp}/unlearn-ray-$UID
mkdir -p "$temporary"
[ -O "$temporary" ] || fail "$temporary belongs to somebody else: name another folder in RAY_TMPDIR"
chmod 700 "$temporary"

# A tenth of the memory, at most 4 GiB: images go from Parquet to the workers past Ray's object store.
store=$(awk '/^MemTotal/ {b = $2 * 1024 / 10; printf "%.0f", (b < 4 * 2^30) ? b : 4 * 2^30}' /proc/meminfo)
# The agent that starts jobs has a fixed port in Ray, and is silently without one where another cluster on this machine has it.
settings=(--block --disable-usage-stats --temp-dir "$temporary/ray" --object-store-memory "$store" --dashboard-agent-listen-port 0)
if [ -n "$join" ]; then
    settings+=(--address "$join")
else
    # Ray's workers, and its client, take any port of a range.
    least=10001 most=19999
    for ((i = 0; i < ${#more[@]}; i++)); do
        case ${more[i]} in
        --min-worker-port) least=${more[i + 1]:-0} ;;
        --max-worker-port) most=${more[i + 1]:-0} ;;
        --min-worker-port=*) least=${more[i]#*=} ;;
        --max-worker-port=*) most=${more[i]#*=} ;;
        esac
    done
    for taken in "$port" "$dashboard"; do
        if ! [[ $taken =~ ^[1-9][0-9]{0,4}$ ]] || ((taken > 65535)); then fail "$taken is no port: give a number below 65536"; fi
        if [[ $least$most =~ ^[0-9]+$ ]] && ((least <= taken && taken <= most)); then
            fail "port $taken is one of those that Ray's workers take ($least to $most): choose another with --port or --dashboard-port, or" \
                "give the workers others with --min-worker-port and --max-worker-port"
        fi
        if (: <>"/dev/tcp/${ip:-127.0.0.1}/$taken") 2>/dev/null; then fail "port $taken is in use: choose others with --port and --dashboard-port"; fi
    done
    settings+=(--head ${ip:+--node-ip-address "$ip"} --port "$port" --dashboard-host 127.0.0.1 --dashboard-port "$dashboard")
fi
# A job's `python` is the one that Ray runs with.
environment=("PATH=$(dirname "$python"):$PATH" "$mark" RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token" RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0)
# Ray takes 127.0.0.1 for this machine's outward address and listens to all the world, unless it is told not to be a cluster; the
# workers of a run do so too, unless they meet in a folder (jobs/rendezvous.py).
if [ -z "$ip$join" ]; then
    environment+=(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo UNLEARN_RAY_FOLDER="$temporary")
fi
# What jobs/cluster.py wants for the workers must be there before Ray is: malloc reads it once.
wanted=$("$python" -c 'from jobs.cluster import WORKER_ENV; print(*map("=".join, WORKER_ENV.items()), sep="\n")')
mapfile -t -O "${#environment[@]}" environment <<<"$wanted"
ulimit -n "$(ulimit -Hn)" 2>/dev/null || true

env --unset=RAY_ADDRESS --unset=RAY_AUTH_TOKEN "${environment[@]}" \
    setsid --fork "$python" -m ray.scripts.scripts start "${settings[@]}" "${more[@]}" >"$log" 2>&1 </dev/null 9>&-

ready() {
    if [ -n "$join" ]; then grep -q 'Ray runtime started' "$log"; else
        RAY_AUTH_TOKEN_PATH=$token "$python" - "http://127.0.0.1:$dashboard/api/jobs/" <<'END' 2>/dev/null
import os, sys, urllib.request
token = open(os.environ["RAY_AUTH_TOKEN_PATH"]).read().strip()
request = urllib.request.Request(sys.argv[1], headers={"Authorization": f"Bearer {token}"})
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5).read()
END
    fi
}
for _ in $(seq 120); do
    sleep 0.5
    if ready; then break; fi
    [ -n "$(node_processes)" ] || { tail -n 15 "$log" >&2; fail "Ray did not start; all it said: $log"; }
done
ready || fail "Ray does not answer after a minute (log: $log); infra/local/stop.sh ends it"

if [ -n "$join" ]; then
    echo "Joined $join. End: infra/local/stop.sh"
    exit
fi
cat <<END
Ray runs on ${ip:-127.0.0.1}:$port. Submit with

    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token
    unlearn submit CONFIG --to http://127.0.0.1:$dashboard

Log: $log    End: infra/local/stop.sh
END
