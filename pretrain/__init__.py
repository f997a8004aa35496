"""Pre-training under DeepSpeed: everything that has time and machines in it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would find out by itself, with a warning
