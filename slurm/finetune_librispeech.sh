#!/usr/bin/env bash
# Speech recognition, 8 GPUs: sbatch slurm/finetune_librispeech.sh CONFIG train.init_from=RUN data.path=/LibriSpeech [section.key=value ...]
#SBATCH --job-name=finetune_librispeech --output=slurm-%x-%j.out --open-mode=append
#SBATCH --nodes=1 --gpus-per-node=8 --cpus-per-gpu=8 --time=24:00:00
#SBATCH --requeue --signal=USR1@300
cd "${SLURM_SUBMIT_DIR:-.}" && [ -f slurm/job.sh ] && exec bash slurm/job.sh finetune "$@"
echo "error: no slurm/job.sh in $PWD: sbatch slurm/finetune_librispeech.sh from the repository's folder" >&2 && exit 2
