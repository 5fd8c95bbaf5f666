PYTHON ?= python3
VENV := .venv
TORCH := $(VENV)/.torch
READY := $(VENV)/.ready
# The CUDA kernels for development: for the GPUs of this machine, or else for any one, to see that they compile. A wheel has them for all.
GPUS = $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | tr '\n' ' '),9.0)
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# What the environment begins with: another version of PyTorch for tests, such as TORCH_PACKAGES="torch==2.10.0 torchvision==0.25.0".
TORCH_PACKAGES ?= "torch>=2.10" torchvision

# Tests run in this many processes, with one thread each. Tests of one file stay together, since they share fixtures.
WORKERS ?= 2
KILLS ?= 100

.PHONY: help demo docs test test-slow test-all test-old test-gpu fuzz torture properties sanitize bench bench-gpu lint lint-workflows format
.PHONY: wheel dist-pure clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo    a trained and untrained networks over real photos: tables, plot, pages"
	@echo "make docs    the documentation as a site, build/site/index.html"
	@echo "make test    lint, types, import rules and the quick tests"
	@echo "make test-all   the same, and the slow tests: compilers, torchrun, wheels, CUDA kernels on the host"
	@echo "make torture runs killed, hindered and damaged at random; KILLS=100 of each command take hours"
	@echo "make properties   10,000 cases for every statistic and operator, against their definitions"
	@echo "make sanitize     the kernels under the address, undefined-behavior and thread sanitizers"
	@echo "make fuzz    changed files for every reader: CASES=20000 for each, SECURITY.md"
	@echo "make bench   speed compared with x.sum(), eager, inductor and other packages, and growth: build/bench/bench.html"
	@echo "make test-gpu, make bench-gpu   the checks and timings that need a GPU"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make format  let ruff fix and format"
	@echo "make wheel   build dist/*.whl with the kernels for the CPU and for every CUDA architecture; CUDA_HOME=/none for the CPU only"
	@echo "make dist-pure   build dist/ with the sources and a wheel without kernels, for any machine"
	@echo "make clean   remove what was built; make distclean removes $(VENV) too"

demo: $(READY)
	torchprobe demo

docs: $(READY)
	python -m pip install --quiet --no-build-isolation --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

test: lint
	OMP_NUM_THREADS=1 python -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow" --durations=10

test-slow: $(READY)
	OMP_NUM_THREADS=1 python -m pytest -q -n $(WORKERS) --dist loadfile -m slow --durations=10

test-all: test
	$(MAKE) test-slow

# What works before torch 2.10: statistics and recording of eager models, in pure Python.
test-old: $(READY)
	OMP_NUM_THREADS=1 TORCHPROBE_DISABLE_KERNELS=1 python -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow" $(addprefix tests/test_,$(addsuffix .py,$(OLD)))
OLD := ablation analysis_kurtosis axes common directions evaluation gradients history hooks layers masks moments nested_and_masks never_ends outlier_rule pruning recording similarity small_statistics statistic_contract storage tensors training

test-gpu: $(READY)
	python tests/on_gpu.py

torture: $(READY)
	OMP_NUM_THREADS=1 python -m tests.torture --kills $(KILLS) --mutations $$((20 * $(KILLS)))

# CASES for each reader; those of slow ones are fewer.
CASES ?= 20000

fuzz: $(READY)
	python -m fuzz all --cases $(CASES)

properties: $(READY)
	OMP_NUM_THREADS=1 python -m pytest -q tests/properties --hypothesis-profile=long

sanitize: $(READY)
	PYTHONPATH=tests OMP_NUM_THREADS=1 python -m sanitize

bench: $(READY)
	mkdir -p build/bench
	python -m benchmarks --json build/bench/bench.json --page build/bench/bench.html

bench-gpu: $(READY)
	python -m benchmarks.gpu

lint-workflows: $(READY)
	zizmor --offline .github
	if command -v actionlint; then actionlint; fi

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

# The sources, and a wheel without kernels for machines that have none of the others.
dist-pure: $(READY)
	TORCHPROBE_BUILD=0 python -m build --no-isolation --outdir dist
	twine check --strict dist/*

$(TORCH):
	@$(PYTHON) -c 'import sys; sys.exit("torchprobe needs Python 3.10 or newer: make PYTHON=python3.11" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	python -m pip install $(TORCH_PACKAGES) "setuptools>=77" wheel ninja
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
