#!/usr/bin/env bash
# Start Ray on machines that ssh reaches: a cluster for `tinysd-batch submit --address`.
#
#   configs/clusters/ssh.sh start miner1 miner2 miner3    # the first becomes the head node
#   ssh miner1 tinysd-batch submit /farm/m.csv -o /farm/job --model /farm/model --address miner1:6379
#   configs/clusters/ssh.sh stop miner1 miner2 miner3     # stops only this cluster
#
# Requirements:
#   - `ssh BOX` works without a password.
#   - The same version of tinysd-batch is installed at the same path on every machine; BIN is the folder with `ray`.
#   - Manifest, model and job folder are on storage that all machines mount at the same path (for example NFS).
#   - Only these machines can reach each other's ports, by a firewall or a VPN such as WireGuard: Ray does not encrypt.
#     With a firewall between the machines, open PORT on the head node, and the PORTS below on all machines.
#
# Anyone with the token can run code on every machine. It is created on the head node and copied to the others through
# ssh. Ray's files are in FOLDER, which is closed to other users and removed by `stop`. A second cluster needs another
# PORT and other PORTS.
set -euo pipefail

BIN=${BIN:-.venv/bin}
PORT=${PORT:-6379}
PORTS=${PORTS---node-manager-port=6380 --object-manager-port=6381 --runtime-env-agent-port=6382 \
--min-worker-port=10002 --max-worker-port=10101}
FOLDER=${FOLDER:-/tmp/tinysd-ray-$PORT}
# Each machine offers all its GPUs, unless RAY_OPTIONS sets, for example, `--num-gpus=1`.
OPTIONS="--disable-usage-stats --object-store-memory=100000000 ${RAY_OPTIONS:-}"
TOKEN=.ray/auth_token
MARK=ssh-$PORT
# Ray runs in FOLDER, so that it cannot import files from another current folder.
RAY="export RAY_AUTH_MODE=token TINYSD_BATCH_DRIVER=$MARK; ray=\$(cd $BIN && pwd)/ray; cd $FOLDER; \"\$ray\""

on() { # on BOX COMMAND: stdin is passed on
    ssh -o BatchMode=yes "$1" "$2"
}

fail() {
    echo "ssh.sh: $1" >&2
    exit 1
}

check_ports() { # check_ports BOX PORT...: fail if a port is in use
    local box=$1
    shift
    on "$box" "$BIN/python -I - $*" << 'PYTHON' || fail "$box: not ready, nothing was started on any machine"
import socket, sys

for port in map(int, sys.argv[1:]):
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("", port))
        except OSError:
            sys.exit(f"port {port} is in use, perhaps by a running Ray (`ssh.sh stop` stops one that "
                     f"`ssh.sh start` started); set PORT and PORTS to use others")
PYTHON
}

make_folder() { # make_folder BOX
    on "$1" "umask 077; mkdir -p $FOLDER && test -O $FOLDER && ! test -L $FOLDER && chmod 700 $FOLDER" < /dev/null ||
        fail "$1: $FOLDER cannot be created, or belongs to another user; set FOLDER to use another one"
}

start() {
    local head=$1 fixed box
    fixed=$(grep -oE -- '-(manager|agent)-port=[0-9]+' <<< "$PORTS" | grep -oE '[0-9]+' | tr '\n' ' ' || true)
    check_ports "$head" "$PORT" "$fixed"
    for box in "${@:2}"; do
        check_ports "$box" "$fixed"
    done
    for box in "$@"; do
        make_folder "$box"
    done
    shift
    on "$head" "umask 077; test -s $TOKEN || $BIN/ray get-auth-token --generate > /dev/null; chmod 600 $TOKEN" < /dev/null
    on "$head" "$RAY start --head --port=$PORT --temp-dir=$FOLDER/ray --include-dashboard=false $PORTS $OPTIONS" < /dev/null
    for box in "$@"; do
        on "$head" "cat $TOKEN" < /dev/null | on "$box" "umask 077; mkdir -p .ray; cat > $TOKEN"
        on "$box" "$RAY start --address=$head:$PORT --temp-dir=$FOLDER/ray $PORTS $OPTIONS" < /dev/null
    done
    echo "Ray runs on $(($# + 1)) machines. On any of them: tinysd-batch submit ... --address $head:$PORT"
}

stop() {
    for box in "$@"; do
        on "$box" "$BIN/python -P -m tinysd_batch.job.ray_workers.reaper $MARK $FOLDER/ray && (rmdir $FOLDER 2> /dev/null || true)" \
            < /dev/null
    done
}

if [[ $# -lt 2 || ($1 != start && $1 != stop) ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
    exit 2
fi
"$@"
