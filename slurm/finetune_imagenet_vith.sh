#!/usr/bin/env bash
# ViT-H/14 fine-tuned on ImageNet-1K, 32 GPUs: sbatch slurm/finetune_imagenet_vith.sh data.path=/imagenet [section.key=value ...]
#SBATCH --job-name=finetune_imagenet_vith --output=slurm-%x-%j.out --open-mode=append
#SBATCH --nodes=4 --gpus-per-node=8 --cpus-per-gpu=8 --time=24:00:00
#SBATCH --requeue --signal=USR1@300
cd "${SLURM_SUBMIT_DIR:-.}" && [ -f slurm/job.sh ] && exec bash slurm/job.sh finetune configs/finetune/imagenet_huge14.yaml "$@"
echo "error: no slurm/job.sh in $PWD: sbatch slurm/finetune_imagenet_vith.sh from the repository's folder" >&2 && exit 2
