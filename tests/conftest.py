"""What has to be said before anything is imported."""

import os

# Kernels of models/fused run on the CPU, whatever there is beside it; benchmarks.gpu has a GPU's agree with torch.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Two files run at a time, and threads that wait for work keep a core busy: some tests take a quarter of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
