#!/usr/bin/env bash
# Ray on a few boxes that ssh reaches: a cluster for `tinysd-batch submit --address`.
#
#   configs/clusters/ssh.sh start miner1 miner2 miner3    # the first becomes the head
#   ssh miner1 tinysd-batch submit /farm/m.csv -o /farm/job --model /farm/model --address auto
#   configs/clusters/ssh.sh stop miner1 miner2 miner3
#
# What must be so:
#   - `ssh BOX` asks for no password.
#   - tinysd-batch, in the same version, lies at the same path on every box; BIN names the folder that has `ray` in it.
#   - Manifest, model and job folder lie on storage that all boxes see at the same path (NFS, say).
#   - Only these boxes reach each other's ports, through a firewall or a VPN such as WireGuard: Ray does not encrypt.
#     With a firewall between the boxes, open PORT on the head, and on all boxes the PORTS below.
#
# Who has the token may run code on every box. It is made on the head and copied to the others through ssh.
set -euo pipefail

BIN=${BIN:-.venv/bin}
PORT=${PORT:-6379}
PORTS=${PORTS---node-manager-port=6380 --object-manager-port=6381 --runtime-env-agent-port=6382 \
--min-worker-port=10002 --max-worker-port=10101}
# A box gives all its GPUs; RAY_OPTIONS may say otherwise, such as `--num-gpus=1`.
OPTIONS="--disable-usage-stats --object-store-memory=100000000 ${RAY_OPTIONS:-}"
TOKEN=.ray/auth_token

on() { # on BOX COMMAND: what is read stays ours
    ssh -o BatchMode=yes "$1" "$2"
}

start() {
    local head=$1
    shift
    on "$head" "umask 077; test -s $TOKEN || $BIN/ray get-auth-token --generate > /dev/null; chmod 600 $TOKEN" < /dev/null
    on "$head" "RAY_AUTH_MODE=token $BIN/ray start --head --port=$PORT --include-dashboard=false $PORTS $OPTIONS" < /dev/null
    for box in "$@"; do
        on "$head" "cat $TOKEN" < /dev/null | on "$box" "umask 077; mkdir -p .ray; cat > $TOKEN"
        on "$box" "RAY_AUTH_MODE=token $BIN/ray start --address=$head:$PORT $PORTS $OPTIONS" < /dev/null
    done
    echo "Ray runs on $(($# + 1)) boxes. On any of them: tinysd-batch submit ... --address auto, or --address $head:$PORT"
}

stop() {
    for box in "$@"; do
        on "$box" "$BIN/ray stop" < /dev/null
    done
}

if [[ $# -lt 2 || ($1 != start && $1 != stop) ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
    exit 2
fi
"$@"
