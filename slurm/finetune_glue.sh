#!/usr/bin/env bash
# GLUE's tasks, one trial after the other on one GPU: sbatch slurm/finetune_glue.sh configs/finetune/glue_*.yaml --lr 1e-5 2e-5 4e-5 6e-5 [--seeds 5] data.path=/glue train.init_from=runs/text_base [section.key=value ...]
#SBATCH --job-name=finetune_glue --output=slurm-%x-%j.out --open-mode=append
#SBATCH --nodes=1 --ntasks=1 --gpus-per-node=1 --cpus-per-gpu=8 --time=24:00:00
#SBATCH --requeue --signal=USR1@300
cd "${SLURM_SUBMIT_DIR:-.}" && [ -f slurm/job.sh ] && exec bash slurm/job.sh finetune.sweep "$@"
echo "error: no slurm/job.sh in $PWD: sbatch slurm/finetune_glue.sh from the repository's folder" >&2 && exit 2
