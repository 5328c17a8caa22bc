#!/usr/bin/env bash
# Start Ray on several boxes over ssh: a cluster for `tinysd-batch submit --address`.
#
#   configs/clusters/ssh.sh start miner1 miner2 miner3    # the first is the head node
#   ssh miner1 tinysd-batch submit /farm/m.csv -o /farm/job --model /farm/model --address miner1:6379
#   configs/clusters/ssh.sh stop miner1 miner2 miner3     # ends this cluster's Ray, and no other
#
# Requirements:
#   - `ssh BOX` works without a password.
#   - The same version of tinysd-batch is installed at the same path on every box; BIN is the folder that contains `ray`.
#   - Manifest, model and job folder are on storage that all boxes mount at the same path, such as NFS.
#   - Only these boxes can reach each other's ports, by a firewall or a VPN such as WireGuard: Ray does not encrypt.
#     If there is a firewall between the boxes, open PORT on the head node, and the PORTS below on all boxes.
#
# Anyone who has the token can run code on every box. It is created on the head node and copied to the others over ssh.
# Ray's files are in FOLDER, which other users cannot access and which `stop` removes. Two clusters need different values
# of PORT and PORTS.
set -euo pipefail

BIN=${BIN:-.venv/bin}
PORT=${PORT:-6379}
PORTS=${PORTS---node-manager-port=6380 --object-manager-port=6381 --runtime-env-agent-port=6382 \
--min-worker-port=10002 --max-worker-port=10101}
FOLDER=${FOLDER:-/tmp/tinysd-ray-$PORT}
# Each box contributes all its GPUs, unless RAY_OPTIONS has another number, such as `--num-gpus=1`.
OPTIONS="--disable-usage-stats --object-store-memory=100000000 ${RAY_OPTIONS:-}"
TOKEN=.ray/auth_token
MARK=ssh-$PORT
# FOLDER is the current folder of Ray's processes, so that they cannot import files from another one.
RAY="export RAY_AUTH_MODE=token TINYSD_BATCH_DRIVER=$MARK; ray=\$(cd $BIN && pwd)/ray; cd $FOLDER; \"\$ray\""

on() { # on BOX COMMAND: run a command on a box
    ssh -o BatchMode=yes "$1" "$2"
}

fail() {
    echo "ssh.sh: $1" >&2
    exit 1
}

check_ports() { # check_ports BOX PORT...: fail if a port is in use
    local box=$1
    shift
    on "$box" "$BIN/python -I - $*" << 'PYTHON' || fail "$box: not ready, nothing was started on any box"
import socket, sys

for port in map(int, sys.argv[1:]):
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError:
            sys.exit(f"port {port} is taken, perhaps by a Ray that is running already (`ssh.sh stop` ends one that "
                     f"`ssh.sh start` started); set PORT and PORTS to use other ports")
PYTHON
}

make_folder() { # make_folder BOX
    on "$1" "umask 077; mkdir -p $FOLDER && test -O $FOLDER && ! test -L $FOLDER && chmod 700 $FOLDER" < /dev/null ||
        fail "$1: $FOLDER cannot be created, or belongs to another user; set FOLDER to another path"
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
    echo "Ray runs on $(($# + 1)) boxes. On any of them: tinysd-batch submit ... --address $head:$PORT"
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
