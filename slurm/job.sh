#!/usr/bin/env bash
# What all jobs have in common: slurm/NAME.sh hands over `MODULE ARGUMENTS...` for python -m; docs/slurm.md has the manual.
#
#   ZERO, TP   ZeRO stage and tensor-parallel size of a training job: sbatch --export=ALL,ZERO=3,TP=2 slurm/...
#   PYTHON     the interpreter; default .venv/bin/python, or python3 where there is none
set -uo pipefail

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi

nodes=1 tasks=1 # of reports and conversions, whatever was allocated
gpus=${SLURM_GPUS_ON_NODE:-0} # however they were asked for
if [ "$1" = pretrain ] || [ "$1" = finetune ]; then
    nodes=$SLURM_JOB_NUM_NODES
    tasks=${SLURM_NTASKS_PER_NODE:-1}
    [ "$gpus" -gt 0 ] && tasks=$gpus
    set -- "$1" "$2" ${ZERO:+"train.deepspeed=ds_configs/zero$ZERO.json"} ${TP:+"train.tensor_parallel=$TP"} "${@:3}"
fi
cpus=$(tr , '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | cut -d '(' -f 1 | sort -n | head -n 1) # the fewest of "128(x2),96"
cpus=$((cpus / tasks > 0 ? cpus / tasks : 1))

# srun reads what sbatch was asked for, too, which need not be what it got. Every task sees all GPUs of its node.
unset SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_CPUS_PER_GPU \
    SLURM_TRES_PER_TASK SLURM_GPU_BIND
[ "$gpus" -gt 0 ] && export SLURM_GPUS_PER_NODE=$gpus

# Nodes' names need not resolve; the address is the one by which SLURM itself reaches the node. The port lies below
# those that systems give out by themselves, and a requeued job does not meet its own old one.
read -r first <<<"$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
address=$(scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p')
export MASTER_ADDR=${address:-$first}
export MASTER_PORT=$((10000 + (SLURM_JOB_ID * 10 + ${SLURM_RESTART_COUNT:-0}) % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
[ "${TP:-1}" -gt 1 ] && export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # megatron-core's wish

# SLURM's signals go to the ranks, not to this shell. They save, and one may leave before the others: none is killed for
# that at once. Those that wait for a rank that has died say so after watch.silent_seconds=40; what is left is killed.
srun --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" --cpus-per-task="$cpus" \
    --kill-on-bad-exit=0 --wait=50 "$PYTHON" -m "$@"
status=$?

# 75 is a training's "saved on a signal". Any other failure would come again; and a job that is cancelled, or that SLURM
# requeues by itself, is no longer RUNNING.
if [ "$status" = 75 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    echo "saved: requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
