#!/bin/bash
# One node of the Ray cluster that runs the SGLang servers: the first is its head and places them, the others join.
address="$RAY_HEAD:$RAY_PORT"
if [ "$SLURM_NODEID" != 0 ]; then
    for ((try = 0; try < 60; try++)); do
        "$RAY" start --address="$address" --block
        sleep 5 # the head is not there yet, or was lost
    done
    exit 1
fi
"$RAY" start --head --node-ip-address="$RAY_HEAD" --port="$RAY_PORT" --disable-usage-stats || exit 1
trap '"$RAY" stop' EXIT
"$RAY_PYTHON" tools/ray_fleet.py --address "$address" --nodes "$NUM_ROLLOUT_NODES" \
    --servers-per-node "$SERVERS_PER_NODE" --tp "$SERVER_TP"
