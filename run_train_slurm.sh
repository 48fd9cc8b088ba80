#!/usr/bin/env bash
# Trains on nodes of a SLURM cluster, from the project's folder, and queues itself again until the run is done:
#     sbatch --nodes=2 --gpus-per-node=4 --cpus-per-task=32 --time=8:00:00 \
#         run_train_slurm.sh scripts/train_voc.py train_voc data.root=VOC2012
#SBATCH --job-name=wsss
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: sbatch [--nodes=N --gpus-per-node=G ...] run_train_slurm.sh SCRIPT TAG [config=NAME] [key=value ...]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
gpus=${SLURM_GPUS_ON_NODE:-0}
devices=cpu count=1
if [ "$gpus" -gt 0 ]; then
    devices=$(seq -s, 0 $((gpus - 1))) count=$gpus
fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES=$SLURM_JOB_NUM_NODES MASTER_ADDR=${hosts[0]}
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then   # srun does not take it from sbatch
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
port=$((20000 + SLURM_JOB_ID % 20000))
code=0
# shellcheck disable=SC2016 # of each task
srun --kill-on-bad-exit=0 bash -c 'NODE_RANK=$SLURM_NODEID exec bash run_train.sh "$@"' run_train \
    "$1" "$devices" "$count" "$port" "$2" "${@:3}" resume=auto || code=$?
if [ "$code" -eq 138 ]; then   # its time was nearly over: SIGUSR1 came, and a state was written
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
