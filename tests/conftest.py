"""One process, one mode: without a GPU, Triton kernels run in the interpreter, which must be chosen before Triton is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
