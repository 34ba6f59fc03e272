# make test    set up and run the tests         make demo    set up and run the main job
# make lint    ruff, format and rules           make types   mypy
# make parity  against transformers and peft    make ci      all that CI runs
# make notebooks  run the notebooks             make format  let ruff repair what it can
#
# Needs Python 3.11 or newer and make; everything else is installed into $(VENV).
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

# Each target installs only the extras it needs, once per change of pyproject.toml.
CORE   = $(VENV)/.installed-core
TEST   = $(VENV)/.installed-test
DEV    = $(VENV)/.installed-dev
PARITY = $(VENV)/.installed-parity
NOTES  = $(VENV)/.installed-notebooks

.PHONY: help test demo lint types parity notebooks format ci clean

help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

test: $(TEST)
	$(BIN)/python -m pytest

demo: $(CORE)
	$(BIN)/mesp-ref finetune

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEV)
	$(BIN)/mypy

parity: $(PARITY)
	$(BIN)/python -m pytest tests/parity tests/verify/test_adapters.py tests/golden/test_frameworks.py -m "slow or not slow"

notebooks: $(NOTES)
	for notebook in notebooks/*.ipynb; do $(BIN)/jupyter execute --timeout=300 $$notebook || exit 1; done

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ci:
	bash .ci/run

clean:
	rm -rf $(VENV) .venv-ci build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# `make -j` would otherwise let two pips work on one environment.
.NOTPARALLEL:

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is missing or older than Python 3.11; use make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

$(CORE): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(TEST) $(DEV) $(PARITY) $(NOTES): $(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

$(TEST):   EXTRAS = test
$(DEV):    EXTRAS = dev,convert
$(PARITY): EXTRAS = test,parity,convert,mlx
$(NOTES):  EXTRAS = notebooks
