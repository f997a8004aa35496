#!/usr/bin/env bash
# A checkpoint as one file of weights: sbatch slurm/convert.sh RUN OUT.safetensors
#SBATCH --job-name=convert --output=slurm-%x-%j.out --open-mode=append
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=4 --time=1:00:00
cd "${SLURM_SUBMIT_DIR:-.}" && [ -f slurm/job.sh ] && exec bash slurm/job.sh convert "$@"
echo "error: no slurm/job.sh in $PWD: sbatch slurm/convert.sh from the repository's folder" >&2 && exit 2
