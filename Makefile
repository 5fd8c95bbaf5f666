PYTHON ?= python3
VENV := .venv
TORCH := $(VENV)/.torch
READY := $(VENV)/.ready
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test bench lint format wheel clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo    a trained and an untrained network over real photos: table, plot, page"
	@echo "make test    lint, types, import floors and the test suite"
	@echo "make bench   speed beside x.sum(), eager, inductor and other packages"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make format  let ruff fix and format"
	@echo "make wheel   build dist/*.whl"
	@echo "make clean   remove what was built; make distclean removes $(VENV) too"

demo: $(READY)
	torchprobe demo

test: lint
	python -m pytest -q --durations=10

bench: $(READY)
	python -m benchmarks

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format: $(READY)
	ruff check --fix .
	ruff format .

wheel: $(READY)
	python -m build --wheel --no-isolation

$(TORCH):
	@$(PYTHON) -c 'import sys; sys.exit("torchprobe needs Python 3.10 or newer: make PYTHON=python3.11" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	python -m pip install "torch>=2.10" torchvision "setuptools>=77" wheel ninja
	@touch $@

$(READY): $(TORCH) $(SOURCES)
	python -m pip install --no-build-isolation --editable ".[all,dev]"
	@python -c "from torchprobe.ops import kernels; print(*(f'{device} kernels {status}' for device, status in kernels().items()), sep='\n')"
	@touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	rm -f torchprobe/_C*.so torchprobe/_build.json $(READY)

distclean: clean
	rm -rf $(VENV)
