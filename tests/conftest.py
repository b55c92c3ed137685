"""One process, one mode: without a GPU, Triton kernels run in the interpreter, which must be chosen before Triton is imported."""

import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch  # after the thread counts
from hypothesis import settings

# OPTMEM_COMPILE_ONLY=1 is the compile gate's process, where the same kernels are compiled and none is run.
if os.environ.get("OPTMEM_COMPILE_ONLY") != "1" and not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    from optmem import interpreter

    interpreter.install()

# A busy machine must not fail a test, and CI must fail twice in the same way or not at all.
settings.register_profile("optmem", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("optmem")


@pytest.fixture
def one_thread():
    """For models so small that they only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
