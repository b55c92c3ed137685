"""The native extensions, nothing else: optmem._cpu always, optmem._cuda wherever nvcc is found.

OPTMEM_CUDA=0 leaves the CUDA module out, OPTMEM_CUDA=1 makes its absence an error, auto (the default) asks for nvcc.
OPTMEM_NATIVE=0 leaves both out: the Makefile installs first and builds in place afterwards, where objects are kept.
OPTMEM_SANITIZE=1 builds the CPU module under AddressSanitizer and UBSan.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# Machine code for the A100 and the H100/H200, and PTX for whatever comes later.
TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")
SANITIZE = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1")


def sources(folder: str, *endings: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for ending in endings for path in (ROOT / "csrc" / folder).glob(f"*{ending}"))


def headers() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))


def find_nvcc() -> str | None:
    wanted = os.environ.get("OPTMEM_CUDA", "auto")
    nvcc = None if wanted == "0" else os.environ.get("NVCC") or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        raise RuntimeError("OPTMEM_CUDA=1, but there is no nvcc on PATH: install the CUDA toolkit or set NVCC to its compiler")
    return nvcc


def toolkit(nvcc: str) -> Path:
    """The folder of the CUDA toolkit.  nvcc may be a wrapper script, so it is asked, not guessed from its place."""
    dry = subprocess.run([nvcc, "-v", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    for line in (dry.stderr + dry.stdout).splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return Path(nvcc).resolve().parents[1]


def cpu_extension() -> Extension:
    sanitize = SANITIZE if os.environ.get("OPTMEM_SANITIZE") == "1" else ()
    return Pybind11Extension(
        "optmem._cpu",
        sources("cpu", ".cpp"),
        depends=headers(),
        include_dirs=["csrc"],
        cxx_std=17,
        extra_compile_args=["-O3", "-fopenmp", "-Wall", "-Wextra", *sanitize],
        extra_link_args=["-fopenmp", *sanitize],
    )


def cuda_extension(nvcc: str) -> Extension:
    home = toolkit(nvcc)
    return Pybind11Extension(
        "optmem._cuda",
        sources("cuda", ".cpp", ".cu"),
        depends=headers(),
        include_dirs=["csrc", str(home / "include")],
        library_dirs=[str(home / "lib64")],
        libraries=["cudart_static", "dl", "rt", "pthread"],
        cxx_std=17,
        extra_compile_args=["-O2", "-Wall", "-Wextra"],
    )


class BuildNative(build_ext):
    """Sends .cu files to nvcc and everything else to the host compiler."""

    def build_extension(self, ext: Extension) -> None:
        kernels = [source for source in ext.sources if source.endswith(".cu")]
        if kernels:
            ext.sources = [source for source in ext.sources if not source.endswith(".cu")]
            ext.extra_objects = [*ext.extra_objects, *(self.compile_cuda(source, ext) for source in kernels)]
        super().build_extension(ext)

    def compile_cuda(self, source: str, ext: Extension) -> str:
        """One .cu file to an object file.  A register spill is an error: it would be a silent loss of speed."""
        out = Path(self.build_temp) / ext.name / (Path(source).stem + ".o")
        out.parent.mkdir(parents=True, exist_ok=True)
        newest = max(Path(path).stat().st_mtime for path in [source, *ext.depends])
        if out.exists() and out.stat().st_mtime > newest and not self.force:
            return str(out)
        assert NVCC is not None
        targets = [f"-gencode={target}" for target in TARGETS]
        flags = ["-std=c++17", "-O3", "-lineinfo", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        spills = ["-Xptxas=-warn-spills", "-Werror=all-warnings"]
        include = [f"-I{folder}" for folder in ext.include_dirs]
        self.spawn([NVCC, "-c", *flags, *spills, *targets, *include, source, "-o", str(out)])
        return str(out)


def extensions() -> list[Extension]:
    if os.environ.get("OPTMEM_NATIVE") == "0":
        return []
    return [cpu_extension(), *([cuda_extension(NVCC)] if NVCC else [])]


NVCC = find_nvcc()
ParallelCompile().install()  # one compiler a core
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
