#!/usr/bin/env bash
# Probes and picture of a run: sbatch slurm/finetune.sh RUN [--data PATH]
#SBATCH --job-name=finetune --output=slurm-%x-%j.out --open-mode=append
#SBATCH --nodes=1 --ntasks=1 --gpus-per-node=1 --cpus-per-gpu=8 --time=4:00:00
cd "${SLURM_SUBMIT_DIR:-.}" && [ -f slurm/job.sh ] && exec bash slurm/job.sh finetune.report "$@"
echo "error: no slurm/job.sh in $PWD: sbatch slurm/finetune.sh from the repository's folder" >&2 && exit 2
