#!/bin/bash
# Start a recipe on the nodes of a SLURM job, one launcher per node. From the repository's root:
#
#   sbatch recipes/accelerate/slurm.sh recipes/accelerate/nodes-2x8-fsdp.yaml recipes/immunize.py --config …
#
#SBATCH --job-name=immunize
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail
export CONFIG=${1:?"which configuration file"}
shift
# sed reads all names; head would leave after the first, and end the job if scontrol was still writing.
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MAIN PORT=$((20000 + SLURM_JOB_ID % 20000)) PROCESSES=$((8 * SLURM_JOB_NUM_NODES))
# SLURM_NODEID differs from node to node, so it is read there.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$CONFIG" \
  --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$MAIN" --main_process_port "$PORT" "$@"' launch "$@"
