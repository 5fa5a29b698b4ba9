#!/bin/bash
# Starts one process per node with all its GPUs. Run it in the repository, with .venv on storage that every node sees:
#
#   sbatch --nodes=4 experiments/launch/slurm.sh run --config experiments/emoji.py --workdir /shared/runs/emoji
#
# For one process per GPU: sbatch --ntasks-per-node=8 --export=ALL,GPUS_PER_PROCESS=1 ...
#SBATCH --job-name=ar-unified
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

# JAX gives each process of a SLURM job one GPU, unless this variable lists others.
if [[ "${GPUS_PER_PROCESS:-8}" -gt 1 ]]; then
  JAX_LOCAL_DEVICE_IDS=$(seq --separator=, 0 $((${GPUS_PER_PROCESS:-8} - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
export PATH="$PWD/.venv/bin:$PATH"

status=0
srun --kill-on-bad-exit=0 ar-unified "$@" || status=$?

# The job was preempted, or 300 s are left of its time: all processes have saved a checkpoint and ended with 143.
if [[ $status -eq 143 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
