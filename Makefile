# Every target builds its own environment first, so `make demo` and `make test` are all that a fresh machine needs.
.ONESHELL:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: check-machine setup test test-all lint demo table reference clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

check-machine:
	@command -v $(PYTHON) >/dev/null || { echo "missing: Python 3.11 or newer (Debian: apt-get install python3)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "missing: Python 3.11 or newer; this is $$($(PYTHON) --version) (set PYTHON=python3.11)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "missing: Python's venv module (Debian: apt-get install python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_paths()["include"], "Python.h").stat()' 2>/dev/null || { echo "missing: Python's headers (Debian: apt-get install python3-dev)"; exit 1; }
	@command -v g++ >/dev/null || { echo "missing: a C++ compiler, which DeepSpeed needs (Debian: apt-get install build-essential)"; exit 1; }

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt | check-machine
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	# torch first: the others then find it, whatever they would have asked for.
	$(BIN)/python -m pip install --quiet -c constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pylint --score n pipeline model degradations jobs demo benchmarks
	$(BIN)/lint-imports

# Two processes: what waits (for Ray to start, for a fault to be noticed) leaves the cores to the other.
PYTEST := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

# SHORT=1: the same stages on fewer clips and steps.
demo: setup
	$(BIN)/python -m demo.run $(if $(SHORT),--short)

# The small shipped models on held-out clips, beside filters without weights.
table: setup
	$(BIN)/python -m demo.table

# basicsr, pyiqa, lpips and others that the tests' recorded arrays come from, and spandrel for Real-ESRGAN;
# nothing else here imports them.
reference: check-machine
	$(PYTHON) -m venv .reference
	.reference/bin/python -m pip install --quiet --upgrade pip 'setuptools<81' wheel cython
	.reference/bin/python -m pip install --quiet -c constraints.txt torch torchvision numpy opencv-python-headless
	.reference/bin/python -m pip install --quiet --no-build-isolation basicsr==1.4.2
	.reference/bin/python -m pip install --quiet -c constraints.txt av pillow
	.reference/bin/python -m pip install --quiet pyiqa lpips DISTS_pytorch spandrel

clean:
	rm -rf out .pytest_cache .mypy_cache .ruff_cache .hypothesis
