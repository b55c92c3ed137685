# Two commands do everything on a fresh machine with Python 3.11+, g++ and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
NATIVE := setup.py $(wildcard csrc/*.h csrc/*/*)

.PHONY: help development demo test lint format bench bench-gpu gate asan wheel-test build clean

help:
	@echo "make demo   draw this README and a chat as pages, say what they cost, read them back"
	@echo "make test   all tests        make lint   ruff, format, mypy     make gate   kernels for GPUs, compiled here"
	@echo "make bench  speed ratios     make bench-gpu  kernels beside their floors     make asan   C++ under sanitizers   make wheel-test   the wheel in a clean venv"

# torch first and by its pin.  Where pip would choose a build with gigabytes of CUDA libraries, TORCH_OPTIONS says where the CPU build is.
.venv/.packages: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "optmem needs Python 3.11 or later: make PYTHON=python3.12"; exit 1; }
	@command -v c++ > /dev/null || { echo "no C++ compiler: apt-get install g++"; exit 1; }
	@$(PYTHON) -c 'import pathlib, sys, sysconfig as s; sys.exit(not pathlib.Path(s.get_path("include"), "Python.h").exists())' \
		|| { echo "no Python.h: apt-get install python3-dev"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv || { echo "no venv: apt-get install python3-venv"; exit 1; }
	$(INSTALL) $(TORCH_OPTIONS) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(INSTALL) setuptools wheel pybind11
	OPTMEM_NATIVE=0 $(INSTALL) --no-build-isolation -e .
	@touch $@

# What tests, lint and gate need besides: test runners, linters, the peers that answers are compared with.
.venv/.development: .venv/.packages
	OPTMEM_NATIVE=0 $(INSTALL) --no-build-isolation -e ".[dev,pdf]"
	@touch $@

.venv/.native: .venv/.packages $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

build: .venv/.native

development: build .venv/.development

demo: build
	@$(BIN)/optmem demo README.md -o out/demo

test: development
	$(BIN)/pytest

lint: development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Kernels compile for real GPUs here, in a process of their own: the other tests run Triton's interpreter.
gate: development
	OPTMEM_COMPILE_ONLY=1 $(BIN)/pytest tests/test_gate.py

bench: development
	$(BIN)/pytest bench --benchmark-enable --benchmark-group-by=group --benchmark-columns=min,median,iqr --benchmark-sort=min

# Kernels beside their floors on a GPU; each prints a table and a line of JSON and keeps it in bench/results/.
bench-gpu: development
	status=0; for part in bench/bench_gpu_*.py; do $(BIN)/python $$part || status=1; done; exit $$status

# The native tests against a copy of the tree built with AddressSanitizer and UBSan.
asan: development
	bash tests/sanitize.sh

wheel-test: development
	bash tests/wheel.sh

clean:
	rm -rf build dist out .venv *.egg-info optmem/*.so
