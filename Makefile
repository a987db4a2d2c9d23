# The commands a newcomer needs. Everything is installed into .venv (another place: make VENV=/path ...).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CODE := $(wildcard src tests examples benchmarks scripts)
# One thread for each test process; no hub; threads that wait without spinning (see src/deltatune/cli/__init__.py).
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

.PHONY: help quickstart test check lint types pytest format docs bench install dev clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.train ## fine-tune a small language model on real data, a few minutes on two CPU cores
	$(BIN)/deltatune train quickstart

test: check pytest ## lint, types and tests

check: lint types

lint: $(VENV)/.dev ## ruff, and its formatter in check mode
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(VENV)/.dev ## mypy --strict
	$(BIN)/mypy

pytest: $(VENV)/.dev ## the tests, in two processes
	@$(TEST_ENV) $(BIN)/python -m pytest -n 2

format: $(VENV)/.dev ## let ruff mend what it can
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: $(VENV)/.dev ## the table against peft, for a quiet machine
	$(BIN)/python benchmarks/run.py

docs: $(VENV)/.docs ## build the documentation into site/
	$(BIN)/mkdocs build --strict

install: $(VENV)/.train ## what the quickstart needs
dev: $(VENV)/.dev ## what the tests need

clean: ## remove the virtual environment and build results; runs/ stays
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache

# Debian's python3 comes without ensurepip unless python3-venv is installed; virtualenv does the same job. It is put
# into a directory of its own, since such systems also refuse pip's installs into their Python.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "deltatune needs Python 3.10 or later")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  $(PYTHON) -m pip install --quiet --target $(VENV).tool virtualenv && \
	  PYTHONPATH=$(VENV).tool $(PYTHON) -m virtualenv $(VENV) && rm -rf $(VENV).tool; }

# PyTorch first and alone: it is by far the largest part, and nothing installed later may bring another build of it.
# The version that the project is tested with comes first; an index without it gives what it has.
$(VENV)/.torch: | $(BIN)/python
	$(PIP) install "torch==2.13.0" || $(PIP) install torch --extra-index-url https://download.pytorch.org/whl/cpu
	touch $@

$(VENV)/.train: pyproject.toml | $(VENV)/.torch
	$(PIP) install -e ".[train]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	$(PIP) install -e ".[dev]"
	touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.torch
	$(PIP) install -e ".[train,docs]"
	touch $@
