"""The compile gate: every kernel built for GPUs that are not there, and its machine code read.

    OPTMEM_COMPILE_ONLY=1 pytest -q tests/test_gate.py        (-rP shows registers and shared memory of every case)

A process of its own: kernels that run in the interpreter cannot be compiled in the same one.  The interpreter accepts what the
compiler refuses, and a spill shows in no answer, only in the time on a machine that CI does not have.
"""

import ast
import os
import re
import subprocess
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch

if os.environ.get("OPTMEM_COMPILE_ONLY") != "1":
    pytest.skip("the compile gate runs alone: OPTMEM_COMPILE_ONLY=1 pytest tests/test_gate.py", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block may have
TENSOR_CORE = {80: "HMMA", 90: "HGMMA"}
OF_E4M3 = "QGMMA"  # the same of 8-bit floats, on sm_90; small tiles widen them in registers
MODULES = {
    path.stem: import_module(f"optmem.kernels.{path.stem}")
    for path in sorted((ROOT / "kernels").glob("*.py"))
    if path.stem != "launch"
}
CASES = [
    pytest.param(case, id=f"{name}-{case.name}")
    for name, module in MODULES.items()
    for case in getattr(module, "gate_cases", tuple)()
]


# --- Triton -------------------------------------------------------------------------------------------------------------------


class AbsentDevice:
    """What the JIT asks a driver for before it compiles.  Kernels are cached by device id, so each architecture has its own."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, _device=None):
        return 0


@pytest.fixture(scope="module", autouse=True)
def empty_cache(tmp_path_factory):
    """Nothing is taken from an earlier run, and none of it stays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(params=[80, 90], ids=["sm80", "sm90"])
def arch(request):
    triton.runtime.driver.set_active(AbsentDevice(request.param))
    return request.param


@dataclass(frozen=True)
class MachineCode:
    """What the assembler made of a kernel."""

    arch: int
    registers: int  # of a thread
    stack: int  # bytes of a thread in local memory: spills, and arrays that are indexed at run time
    local_accesses: int  # LDL and STL instructions
    tensor_core: int  # HMMA, HGMMA or QGMMA instructions
    shared: int  # bytes of a block
    slower: int = 0  # HMMA instructions where HGMMA or QGMMA is meant
    wide_loads: int = 0  # of 16 bytes, in the innermost loop that has any

    def faults(self, *, tensor_cores, wide_loads=None, most_registers=255):
        if self.stack or self.local_accesses:
            yield f"{self.stack} bytes of stack and {self.local_accesses} accesses to local memory: a spill"
        if self.shared > SHARED_LIMIT[self.arch]:
            yield f"{self.shared} bytes of shared memory, and sm_{self.arch} has {SHARED_LIMIT[self.arch]}"
        if tensor_cores and not self.tensor_core:
            yield f"a dot of 16-bit operands, and no {TENSOR_CORE[self.arch]}"
        if tensor_cores and self.slower:
            yield f"{self.slower} HMMA beside HGMMA: one of the dots is at half speed"
        if wide_loads is not None and self.wide_loads != wide_loads:
            yield f"{self.wide_loads} loads of 16 bytes in a step, where {wide_loads} are meant: the others are narrower"
        if self.arch == 90 and self.registers > most_registers:
            yield f"{self.registers} registers, where {most_registers} are meant: fewer programs on a multiprocessor"


def build(kernel, arguments, options, folder, *, has_small_dots=False):
    """Through the JIT's own specialisation, as a launch would."""
    compiled = kernel.warmup(*arguments, grid=(1,), **options)
    arch = compiled.metadata.target.arch
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = run_tool("cuobjdump", "-res-usage", cubin)
    registers, stack = (int(number) for number in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    sass = run_tool("nvdisasm", "-c", "-ndf", cubin)  # no analysis of data flow, which takes as long as all the rest
    is_e4m3 = any(getattr(argument, "dtype", None) == torch.float8_e4m3fn for argument in arguments)
    products = "HMMA" if has_small_dots else OF_E4M3 if is_e4m3 else TENSOR_CORE[arch]
    local_accesses, hmma, tensor_core = (len(re.findall(rf"\b(?:{name})\b", sass)) for name in ("LDL|STL", "HMMA", products))
    slower = 0 if products == "HMMA" else hmma
    return MachineCode(
        arch, registers, stack, local_accesses, tensor_core, compiled.metadata.shared, slower, wide_loads_of_a_step(sass)
    )


def wide_loads_of_a_step(sass):
    """Loads of 16 bytes from global memory, into registers or shared memory, in the shortest loop that has any."""
    labels, code, found = {}, [], [(0, 0)]
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1])
            target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction[1])
            if target and target[1] in labels:  # a branch back
                body = code[labels[target[1]] :]
                loads = sum(bool(re.search(r"\b(?:LDG|LDGSTS)\.[\w.]*\b128\b", each)) for each in body)
                found += [(len(body), loads)] if loads else []
    return min(found[1:] or found)[1]


def run_tool(name, *arguments):
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("case", CASES)
def test_triton(case, arch, tmp_path):
    if arch < case.least_arch:
        with pytest.raises(triton.CompilationError, match="fp8e4nv"):  # which is why optmem.machine.require_e4m3 refuses it first
            build(case.kernel, case.arguments, case.options, tmp_path)
        return
    code = build(case.kernel, case.arguments, case.options, tmp_path, has_small_dots=case.has_small_dots)
    print(code)
    assert code.arch == arch
    wanted = {"tensor_cores": case.tensor_cores, "wide_loads": case.wide_loads, "most_registers": case.most_registers}
    assert not list(code.faults(**wanted))


@pytest.mark.parametrize("name", MODULES)
def test_every_kernel_has_cases(name):
    tree = ast.parse((ROOT / "kernels" / f"{name}.py").read_text())
    kernels = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")}
    assert kernels, f"kernels/{name}.py has no function called *_kernel"
    built = {case.kernel.fn.__name__ for case in getattr(MODULES[name], "gate_cases", tuple)()}
    assert built == kernels, f"kernels/{name}.py: gate_cases() must build {sorted(kernels)}, and builds {sorted(built)}"


@triton.jit
def greedy_kernel(x, y, N: tl.constexpr):
    o_ij = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_x = tl.load(x + o_ij)
    b_y = tl.dot(b_x, b_x)
    tl.store(y + o_ij, b_y)


def greedy(folder, num_warps):
    """A 128 x 128 sum: 64 registers of a thread in eight warps; in two 256, and a thread has 255."""
    tensors = (torch.empty(0, dtype=torch.bfloat16, device="meta"), torch.empty(0, device="meta"))
    return build(greedy_kernel, tensors, {"N": 128, "num_warps": num_warps}, folder)


@pytest.mark.usefixtures("arch")
def test_the_gate_catches_a_spill(tmp_path):
    assert not list(greedy(tmp_path, num_warps=8).faults(tensor_cores=True))
    assert "a spill" in next(greedy(tmp_path, num_warps=2).faults(tensor_cores=True))


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"stack": 8}, "a spill"),
        ({"local_accesses": 1}, "a spill"),
        ({"shared": 227 * 1024 + 1}, "232449 bytes of shared memory"),
        ({"arch": 80, "shared": 164 * 1024}, "sm_80 has 166912"),
        ({"tensor_core": 0}, "no HGMMA"),
        ({"slower": 8}, "8 HMMA beside HGMMA"),
        ({"wide_loads": 4}, "4 loads of 16 bytes in a step, where 8 are meant"),
        ({"registers": 129}, "129 registers, where 128 are meant"),
    ],
)
def test_the_gate_catches(figures, words):
    good = {"arch": 90, "registers": 128, "stack": 0, "local_accesses": 0, "tensor_core": 1, "shared": 163 * 1024, "wide_loads": 8}
    wanted = {"tensor_cores": True, "wide_loads": 8, "most_registers": 128}
    assert not list(MachineCode(**good).faults(**wanted))
    (fault,) = MachineCode(**{**good, **figures}).faults(**wanted)
    assert words in fault


@triton.jit
def rows_kernel(x, y, N, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(N):
        b_sum += tl.load(x + row * STRIDE + tl.arange(0, BLOCK))
    tl.store(y + tl.arange(0, BLOCK), b_sum)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize(("stride", "wide"), [(1024, 2), (1022, 0)])
def test_the_gate_counts_wide_loads(stride, wide, tmp_path):
    """1,024 numbers in 128 threads are two loads of 16 bytes, unless a row may begin anywhere."""
    tensors = (torch.empty(0, device="meta"), torch.empty(0, device="meta"))
    options = {"STRIDE": stride, "BLOCK": 1024, "num_warps": 4}
    code = build(rows_kernel, (*tensors, 7), options, tmp_path)
    assert code.wide_loads == wide


# --- CUDA C++ -----------------------------------------------------------------------------------------------------------------

SPILLING = """
// Two blocks of 1024 threads on a multiprocessor leave 32 registers a thread; 64 sums that live together do not fit.
__global__ void __launch_bounds__(1024, 2) spilling(const float* x, float* y, int n) {
  float sums[64] = {};
  for (int i = 0; i < n; i++) {
    for (int k = 0; k < 64; k++) sums[k] = sums[k] * x[i * 64 + k] + x[i];
  }
  for (int k = 0; k < 64; k++) y[threadIdx.x * 64 + k] = sums[k];
}
"""


@pytest.fixture
def compile_cuda(tmp_path, monkeypatch):
    """setup.py's own compilation of one .cu file, its targets and its flags; raises where nvcc fails."""
    pytest.importorskip("pybind11")
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    distribution = setuptools.distutils.core.run_setup("setup.py", stop_after="init")
    extension = next((module for module in distribution.ext_modules if module.name == "optmem._cuda"), None)
    if extension is None:
        pytest.skip("setup.py finds no nvcc here (or OPTMEM_CUDA=0): install the CUDA toolkit or set NVCC")
    command = distribution.get_command_obj("build_ext")
    command.build_temp = str(tmp_path)
    command.force = True
    command.ensure_finalized()
    return lambda source: command.compile_cuda(str(source), extension)


SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.mark.parametrize("source", SOURCES, ids=[source.name for source in SOURCES])
def test_cuda(source, compile_cuda):
    assert Path(compile_cuda(source)).stat().st_size > 0


def test_the_gate_catches_a_spill_in_cuda(compile_cuda, tmp_path, capfd):
    modest = tmp_path / "modest.cu"
    modest.write_text(SPILLING.replace("(1024, 2)", "(128)"))
    compile_cuda(modest)
    spilling = tmp_path / "spilling.cu"
    spilling.write_text(SPILLING)
    with pytest.raises(Exception, match="nvcc"):
        compile_cuda(spilling)
    assert "spill" in "".join(capfd.readouterr()).lower()
