#!/usr/bin/env bash
# ViT-B/16 fine-tuned on ImageNet-1K, 16 GPUs: sbatch slurm/finetune_imagenet_vitb.sh data.path=/imagenet [section.key=value ...]
#SBATCH --job-name=finetune_imagenet_vitb --output=slurm-%x-%j.out --open-mode=append
#SBATCH --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 --time=24:00:00
#SBATCH --requeue --signal=USR1@300
cd "${SLURM_SUBMIT_DIR:-.}" && [ -f slurm/job.sh ] && exec bash slurm/job.sh finetune configs/finetune/imagenet_base.yaml "$@"
echo "error: no slurm/job.sh in $PWD: sbatch slurm/finetune_imagenet_vitb.sh from the repository's folder" >&2 && exit 2
