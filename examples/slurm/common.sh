# Functions of the batch scripts. A script sources this file after its settings.

# One log folder per attempt: a requeued job keeps its id, and SLURM_RESTART_COUNT counts.
open_logs() {
    ATTEMPT="job_${SLURM_JOB_ID}_attempt_${SLURM_RESTART_COUNT:-0}"
    LOG_DIR="$RUN_DIR/logs/$ATTEMPT"
    mkdir -p "$LOG_DIR"
    echo "$ATTEMPT on ${SLURM_JOB_NODELIST}, logs in $LOG_DIR"
}

# The batch shell gets SIGTERM (--signal=B:TERM@..., preemption with GraceTime, scancel --batch --signal=TERM).
# srun passes SIGUSR1 on to its tasks; SIGTERM would make srun end the step.
handle_stop_signals() {
    PREEMPTED=0 TRAIN="" SERVERS="" WAITER=""
    trap on_stop_signal TERM USR1
}

on_stop_signal() {
    PREEMPTED=1
    echo "stop signal at $(date +%T)"
    if [ -n "$TRAIN" ]; then kill -USR1 "$TRAIN" 2> /dev/null; fi
    if [ -n "$WAITER" ]; then kill "$WAITER" 2> /dev/null; fi
}

# wait_for PID: its exit code; a signal only interrupts the wait.
wait_for() {
    local code again
    while true; do
        wait "$1"
        code=$?
        kill -0 "$1" 2> /dev/null || break
    done
    # When it ended right after an interrupted wait its code is still to be had; 127 says that it was collected.
    wait "$1" 2> /dev/null
    again=$?
    if [ "$again" != 127 ]; then code=$again; fi
    return "$code"
}

# urls NODE...: one URL per server.
urls() {
    local node index
    for node in "$@"; do
        for ((index = 0; index < SERVERS_PER_NODE; index++)); do echo "http://$node:$((SERVER_PORT + index))"; done
    done
}

# wait_until_ready URL...: blocks until the servers answer; 1 on the deadline, when they ended, and on a stop signal.
wait_until_ready() {
    "$PYTHON" tools/wait_ready.py --deadline-s "$READY_DEADLINE_S" --pid "$SERVERS" "$@" &
    WAITER=$!
    wait_for "$WAITER"
    local code=$?
    WAITER=""
    return "$code"
}

# start_training NODES HEAD OPTION...: torchrun on every trainer node, in the background.
start_training() {
    local nodes=$1 head=$2
    shift 2
    local count
    count=$(wc -w <<< "${nodes//,/ }")
    # shellcheck disable=SC2016
    srun --overlap --nodelist="$nodes" --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        --output="$LOG_DIR/train_%n.log" --job-name=train \
        "$PYTHON" tools/launch.py --grace-s "$GRACE_S" -- \
        --nnodes="$count" --nproc-per-node="$RANKS_PER_NODE" --max-restarts=0 \
        --rdzv-backend=c10d --rdzv-endpoint="$head:$RENDEZVOUS_PORT" --rdzv-id="$ATTEMPT" \
        --rdzv-conf="join_timeout=$READY_DEADLINE_S" \
        -m spear_megatron train --config "$CONFIG" trainer.default_local_dir="$RUN_DIR" "$@" &
    TRAIN=$!
    # A signal that came just before had nobody to be passed to.
    if [ "$PREEMPTED" = 1 ]; then kill -USR1 "$TRAIN"; fi
}

# finish CODE: stop the servers; hand the job back to the queue if it was told to stop and could save.
finish() {
    local code=$1
    if [ -n "$SERVERS" ]; then
        kill "$SERVERS" 2> /dev/null
        wait_for "$SERVERS"
    fi
    if [ "$PREEMPTED" = 1 ] && [ "$code" = 0 ]; then
        if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ]; then
            echo "saved: back to the queue"
            trap '' TERM
            scontrol requeue "$SLURM_JOB_ID"
            sleep 60 # the controller ends this script
        fi
        echo "saved; $MAX_RESTARTS restarts are used up: submit the same script again to continue"
    fi
    exit "$code"
}
