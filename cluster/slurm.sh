#!/usr/bin/env bash
# Pretraining on a Slurm allocation: a Ray node on each of its nodes, and the driver on the first. No Ray is left behind.
#
# Fill in the lines below as your site wants them (partition, account, GPUs, time), PHYSIO_DIST and the configuration. The
# folder of the checkout, with .venv as `bash tools/setup.sh` makes it, is at the same path on all nodes; so is run.dir, or
# it is an s3:// URL, whose credentials lie in ~/.aws. With one node it works as well.
#
#   $ sbatch cluster/slurm.sh run.name=ecg run.dir=s3://BUCKET/runs data.index=s3://BUCKET/shards/ecg
#   $ tail -f physio-dist-JOBID.log
#   $ scancel --signal=TERM --batch JOBID
#
# The last asks the run to save and stop; `sbatch` with the same words goes on. Five minutes before its time is over Slurm
# does the same by itself, and the job goes back into the queue.
#SBATCH --job-name=physio-dist
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
set -euo pipefail

PHYSIO_DIST=${PHYSIO_DIST:-$SLURM_SUBMIT_DIR}
config=${CONFIG:-$PHYSIO_DIST/configs/pretrain/ecg_base.yaml}
ranks=${RANKS:-$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-1}))}
cd "$PHYSIO_DIST"
export PATH="$PHYSIO_DIST/.venv/bin:$PATH"

# A token of this job alone. It goes to the nodes in srun's environment and stands in no file.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# Other jobs on the same node have ports and folders of their own.
port=$((20000 + SLURM_JOB_ID % 1000 * 10))
export NODE_DIR="/tmp/ray-$SLURM_JOB_ID"

steps=()
trap 'kill -TERM "${steps[@]}" 2>/dev/null; wait; srun --overlap rm -rf "$NODE_DIR"' EXIT

start_ray() {  # start_ray NODES OPTIONS-OF-SRUN -- OPTIONS-OF-RAY-START
    local nodes=$1 of_srun=()
    shift
    while [ "$1" != -- ]; do of_srun+=("$1"); shift; done
    shift
    # Each node counts its own GPUs.
    # shellcheck disable=SC2016  # these are the node's variables
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --overlap "${of_srun[@]}" bash -c '
        exec ray start "$@" --block --temp-dir "$NODE_DIR" --num-cpus "${SLURM_CPUS_PER_TASK:-1}" \
            --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats' - "$@" &
    steps+=($!)
}

head=$SLURMD_NODENAME
agent=(--dashboard-agent-listen-port="$((port + 1))")
start_ray 1 --nodelist="$head" -- "${agent[@]}" --head --port="$port" --ray-client-server-port="$((port + 2))" \
    --dashboard-host=127.0.0.1 --dashboard-port="$((port + 3))"
for _ in $(seq 60); do
    ray health-check --address "$head:$port" >/dev/null 2>&1 && break
    sleep 1
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    start_ray "$((SLURM_JOB_NUM_NODES - 1))" --exclude="$head" -- "${agent[@]}" --address="$head:$port"
fi

# The driver waits until the nodes have come. Of an option that is given twice the last one counts.
RAY_ADDRESS="$head:$port" python -m physio_dist.launch --config "$config" \
    cluster.workers="$ranks" cluster.placement_timeout_s=300 "$@" & driver=$!
over=
trap 'over=yes; kill -TERM $driver' USR1
trap 'kill -TERM $driver' TERM INT
# A signal ends a `wait`, and not the driver, which is saving then.
while kill -0 $driver 2>/dev/null; do wait $driver || true; done
status=0
wait $driver || status=$?
if [ "$status" = 75 ] && [ -n "$over" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
