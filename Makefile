PYTHON ?= python3
VENV := .venv
TORCH := $(VENV)/.torch
READY := $(VENV)/.ready
# The CUDA kernels for development: for the GPUs of this machine, or else for any one, to see that they compile. A wheel has them for all.
GPUS = $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | tr '\n' ' '),9.0)
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Quick tests run in this many processes, with one thread each. Tests of one file stay together, since they share fixtures.
WORKERS ?= 2

.PHONY: help demo test test-slow test-all test-gpu bench bench-gpu lint format wheel clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo    a trained and untrained networks over real photos: tables, plot, pages"
	@echo "make test    lint, types, import rules and the quick tests"
	@echo "make test-all   the same, and the slow tests: compilers, torchrun, wheels, CUDA kernels on the host"
	@echo "make bench   speed compared with x.sum(), eager, inductor and other packages"
	@echo "make test-gpu, make bench-gpu   the checks and timings that need a GPU"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make format  let ruff fix and format"
	@echo "make wheel   build dist/*.whl with the kernels for the CPU and for every CUDA architecture"
	@echo "make clean   remove what was built; make distclean removes $(VENV) too"

demo: $(READY)
	torchprobe demo

test: lint
	OMP_NUM_THREADS=1 python -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow" --durations=10

test-slow: $(READY)
	python -m pytest -q -m slow --durations=10

test-all: test
	$(MAKE) test-slow

test-gpu: $(READY)
	python tests/on_gpu.py

bench: $(READY)
	python -m benchmarks

bench-gpu: $(READY)
	python -m benchmarks.gpu

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format: $(READY)
	ruff check --fix .
	ruff format .

# What PyTorch brings is left out of the audit; the tag says which glibc the rest needs.
wheel: $(READY)
	rm -rf build
	TORCHPROBE_BUILD=1 python -m build --wheel --no-isolation --outdir build
	auditwheel repair --exclude "libtorch*.so" --exclude libc10.so --wheel-dir dist build/*.whl

$(TORCH):
	@$(PYTHON) -c 'import sys; sys.exit("torchprobe needs Python 3.10 or newer: make PYTHON=python3.11" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	python -m pip install "torch>=2.10" torchvision "setuptools>=77" wheel ninja
	@touch $@

$(READY): $(TORCH) $(SOURCES)
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$(strip $(GPUS))}" python -m pip install --no-build-isolation --editable ".[all,demo,dev]"
	@python -c "from torchprobe.ops import kernels; print(*(f'{device} kernels {status}' for device, status in kernels().items()), sep='\n')"
	@touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	rm -f torchprobe/_C*.so torchprobe/_build.json $(READY)

distclean: clean
	rm -rf $(VENV)
