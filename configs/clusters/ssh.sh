#!/usr/bin/env bash
# Ray on a few boxes that ssh reaches: a cluster for `tinysd-batch submit --address`.
#
#   configs/clusters/ssh.sh start miner1 miner2 miner3    # the first becomes the head
#   ssh miner1 tinysd-batch submit /farm/m.csv -o /farm/job --model /farm/model --address miner1:6379
#   configs/clusters/ssh.sh stop miner1 miner2 miner3     # ends this cluster's Ray, and no other
#
# What must be so:
#   - `ssh BOX` asks for no password.
#   - tinysd-batch, in the same version, lies at the same path on every box; BIN names the folder that has `ray` in it.
#   - Manifest, model and job folder lie on storage that all boxes see at the same path (NFS, say).
#   - Only these boxes reach each other's ports, through a firewall or a VPN such as WireGuard: Ray does not encrypt.
#     With a firewall between the boxes, open PORT on the head, and on all boxes the PORTS below.
#
# Who has the token may run code on every box. It is made on the head and copied to the others through ssh. Ray's files
# lie in FOLDER, closed to other users, which `stop` removes. Two clusters need two PORTs, and other PORTS.
set -euo pipefail

BIN=${BIN:-.venv/bin}
PORT=${PORT:-6379}
PORTS=${PORTS---node-manager-port=6380 --object-manager-port=6381 --runtime-env-agent-port=6382 \
--min-worker-port=10002 --max-worker-port=10101}
FOLDER=${FOLDER:-/tmp/tinysd-ray-$PORT}
# A box gives all its GPUs; RAY_OPTIONS may say otherwise, such as `--num-gpus=1`.
OPTIONS="--disable-usage-stats --object-store-memory=100000000 ${RAY_OPTIONS:-}"
TOKEN=.ray/auth_token
MARK=ssh-$PORT
# Ray's processes stand in the folder, so that nothing else in a current folder can be imported.
RAY="export RAY_AUTH_MODE=token TINYSD_BATCH_DRIVER=$MARK; ray=\$(cd $BIN && pwd)/ray; cd $FOLDER; \"\$ray\""

on() { # on BOX COMMAND: what is read stays ours
    ssh -o BatchMode=yes "$1" "$2"
}

fail() {
    echo "ssh.sh: $1" >&2
    exit 1
}

check_ports() { # check_ports BOX PORT...: whether nobody listens on them yet
    local box=$1
    shift
    on "$box" "$BIN/python -I - $*" << 'PYTHON' || fail "$box: not ready, nothing was started on any box"
import socket, sys

for port in map(int, sys.argv[1:]):
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("", port))
        except OSError:
            sys.exit(f"port {port} is taken, by a Ray that runs already perhaps (`ssh.sh stop` ends one that "
                     f"`ssh.sh start` began); PORT and PORTS name others")
PYTHON
}

make_folder() { # make_folder BOX
    on "$1" "umask 077; mkdir -p $FOLDER && test -O $FOLDER && ! test -L $FOLDER && chmod 700 $FOLDER" < /dev/null ||
        fail "$1: $FOLDER cannot be made, or belongs to somebody else; FOLDER names another one"
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
