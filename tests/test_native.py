"""The compiled modules: instruction sets can be forced, and a machine without a driver has no CUDA device but no error either."""

import os
import subprocess
import sys

import pytest
import torch

from optmem.errors import BackendError
from optmem.native import NativeModule, native
from optmem.testing import available_isas, forced_isa


def test_every_instruction_set_can_be_forced():
    cpu = native("_cpu").require()
    for isa in available_isas():
        with forced_isa(isa):
            assert cpu.isa() == isa


@pytest.mark.parametrize("name", ["", "sse", "AVX2"])
def test_unknown_instruction_sets_are_refused(name):
    with pytest.raises(ValueError, match="auto, plain, avx2 or avx512"):
        native("_cpu").require().force_isa(name)


def test_the_environment_caps_the_instruction_set():
    program = "import optmem._cpu as cpu; print(cpu.isa())"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"OPTMEM_ISA": "plain"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "plain"


def test_an_instruction_set_that_cannot_be_had_is_one_sentence():
    program = "from optmem.cli import main; main(['env'])"
    env = os.environ | {"OPTMEM_ISA": "sse"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr.startswith("optmem: OPTMEM_ISA: the instruction set must be")


@pytest.mark.skipif(native("_cuda").module is None, reason="optmem._cuda is not built: no nvcc here")
def test_cuda_module_counts_devices_without_a_driver():
    assert native("_cuda").require().device_count() == torch.cuda.device_count()


def test_a_missing_module_says_what_to_do():
    with pytest.raises(BackendError, match=r"optmem\._cuda is not here \(no nvcc\); build it"):
        NativeModule("_cuda", None, "no nvcc").require()
