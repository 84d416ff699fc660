# `make demo` and `make test` do everything on a machine with Python >= 3.11, git, make and gcc. `make` lists the rest.

PYTHON ?= python3
CONCEPT ?= style-ink
PORT ?= 5000

VENV := .venv
READY := $(VENV)/.ready
EXTRAS := $(VENV)/.extras
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
# pip reads PIP_FIND_LINKS by itself, uv does not; a CPU build of torch found there saves gigabytes.
FIND_LINKS := $(foreach place,$(PIP_FIND_LINKS),--find-links "$(place)")

# uv leaves compiling to the first import. Where PYTHONDONTWRITEBYTECODE is set, as in many containers, that is every
# import, in every process of a job: 26 s of CPU instead of 10 for all libraries (docs/decisions.md).
INSTALL := $(VENV)/bin/uv pip install --quiet --compile-bytecode

.DEFAULT_GOAL := help
.PHONY: help setup demo test mutants lint format ui up down lock clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

setup: $(READY) ## make .venv from requirements.lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, found $$($(PYTHON) --version); pass PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -qq "uv>=0.5"
	VIRTUAL_ENV="$(CURDIR)/$(VENV)" $(INSTALL) $(FIND_LINKS) -r requirements.lock
	VIRTUAL_ENV="$(CURDIR)/$(VENV)" $(INSTALL) --no-deps -e .
	@touch $@

# The extras are for GPUs and phones' pictures and cost every import a second: only whoever tests has them unasked.
$(EXTRAS): $(READY) extras.lock
	@VIRTUAL_ENV="$(CURDIR)/$(VENV)" $(INSTALL) $(FIND_LINKS) --constraint requirements.lock \
	  --constraint extras.lock -e '.[heic,quantization]'
	@touch $@

demo: $(READY) ## tune the embedded base to CONCEPT (style-ink) and show it: all stages, those already done are skipped
	@$(RUN) dvc repro report@$(CONCEPT) register@$(CONCEPT)
	@$(RUN) dopsd show --concept $(CONCEPT)

test: $(EXTRAS) lint ## lint, types and tests
	@$(RUN) python -m pytest

mutants: $(READY) ## would the tests notice a fault in the method's own code? Half an hour; writes docs/mutants.md
	@VIRTUAL_ENV="$(CURDIR)/$(VENV)" $(INSTALL) $(FIND_LINKS) --constraint requirements.lock --group mutants
	@$(RUN) OMP_NUM_THREADS=1 python -m tests.mutants

lint: $(EXTRAS) ## ruff and mypy
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

format: $(READY) ## let ruff lay out and fix what it can
	@$(RUN) ruff format .
	@$(RUN) ruff check --fix .

ui: $(READY) ## open the tracker (MLflow) on 127.0.0.1:PORT; prints the log-in
	@$(RUN) MLFLOW_PORT=$(PORT) python -m infra.local.ui

up: $(READY) ## start MLflow, Prefect and Ray here (set MLFLOW_PORT, PREFECT_PORT, RAY_PORT for other ports)
	@$(RUN) python -m infra.local.services up

down: $(READY) ## end all that `make up` started
	@$(RUN) python -m infra.local.services down

COMPILE := $(VENV)/bin/uv pip compile pyproject.toml --group dev --python-version 3.11 $(FIND_LINKS) --quiet \
  --constraint .cache/torch.txt --no-header --no-annotate --no-emit-find-links --no-emit-index-url

lock: ## pin anew what pyproject.toml asks for; pins that still fit stay
	@mkdir -p .cache  # the torch that is installed stays: the index's own newest one may be a CUDA build of gigabytes
	@$(VENV)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > .cache/torch.txt
	@$(COMPILE) -o requirements.lock
	@$(COMPILE) --constraint requirements.lock --all-extras -o .cache/all.lock
	@grep -vxFf requirements.lock .cache/all.lock > extras.lock
	@sed -i -E 's/^(torch==[0-9.]+)\+.*/\1/; 1i # The versions that were tested, made by `make lock`. Torch without a build tag: CPU and CUDA builds both satisfy it.' requirements.lock

clean: ## remove what the tools left; data, runs and the environment stay
	rm -rf build mutants *.egg-info .mypy_cache .pytest_cache .ruff_cache .cache/mypy
	find dopsd tests -name __pycache__ -type d -prune -exec rm -rf {} +
