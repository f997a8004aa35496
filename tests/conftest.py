"""What has to be said before anything is imported."""

import os

# Kernels of models/fused run on the CPU, whatever there is beside it; benchmarks.gpu has a GPU's agree with torch.
os.environ.setdefault("TRITON_INTERPRET", "1")
