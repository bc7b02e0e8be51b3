#!/bin/bash
# One SGLang server: task SLURM_LOCALID of a node takes its share of the GPUs and its own port. Started by srun.
# A server that ends is started again after a pause; the trainer sends it the current weights.
export SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=false
first=$((SLURM_LOCALID * SERVER_TP))
if [ "${SERVER_USES_GPU:-1}" = 1 ]; then
    CUDA_VISIBLE_DEVICES=$(seq -s, "$first" $((first + SERVER_TP - 1)))
    export CUDA_VISIBLE_DEVICES
fi
for ((try = 0; try <= SERVER_RESTARTS; try++)); do
    # shellcheck disable=SC2086
    $SERVER_PROGRAM --model-path "$MODEL" --host 0.0.0.0 --port $((SERVER_PORT + SLURM_LOCALID)) $SERVER_OPTIONS
    echo "server $SLURM_LOCALID of $(hostname) ended with $? at $(date +%T)" >&2
    sleep 10
done
exit 1
