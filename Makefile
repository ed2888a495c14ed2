# make demo    the whole path on a small model, ending in the result table (a few minutes)
# make setup   the environment for working on tolkit
# make test    the tests          make check   everything continuous integration runs
# make lint    style and types    make bench   timings, printed     make docs   generated pages
#
# Needs Python 3.11+ with pip and a package index; creates $(VENV) itself. Variables:
#   PYTHON=python3.12       the interpreter to build the environment from
#   TORCH_INDEX=URL         the package index torch alone comes from (a CPU or a CUDA one)
#   TORCH=torch==2.13.0     which torch
#   DEMO=runs/demo          where `make demo` writes
#   JOBS=2                  tests at a time

VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
DEMO ?= runs/demo
JOBS ?= 2
SUITABLE = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUITABLE)' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint bench docs clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

setup: $(VENV)/.dev

demo: $(VENV)/.demo
	$(BIN)/tol demo -o $(DEMO) --force

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

check: lint test

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	for script in tests/bench/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

docs: $(VENV)/.demo
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# A Python without ensurepip (Debian's) still has pip: use that one to fill the environment.
$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c '$(SUITABLE)' || { echo "$(PYTHON) is older than Python 3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@touch $@

# torch alone first: an index named for torch is not asked for anything else.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml constraints.txt
	$(INSTALL) --editable '.[plots]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) --editable '.[dev]'
	@touch $@
