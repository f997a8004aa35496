#!/usr/bin/env bash
# data2vec 2.0 large on running text, 32 GPUs: sbatch slurm/pretrain_text_large.sh data.path=/corpus/books_wiki [section.key=value ...]
#SBATCH --job-name=pretrain_text_large --output=slurm-%x-%j.out --open-mode=append
#SBATCH --nodes=4 --gpus-per-node=8 --cpus-per-gpu=8 --time=24:00:00
#SBATCH --requeue --signal=USR1@300
cd "${SLURM_SUBMIT_DIR:-.}" && [ -f slurm/job.sh ] && exec bash slurm/job.sh pretrain configs/pretrain/text_large.yaml "$@"
echo "error: no slurm/job.sh in $PWD: sbatch slurm/pretrain_text_large.sh from the repository's folder" >&2 && exit 2
