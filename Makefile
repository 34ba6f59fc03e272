# make test    set up and run the tests         make demo    set up and run the main job
# make lint    ruff, format and rules           make types   mypy
# make parity  against transformers and peft    make ci      all that CI runs
#
# Needs Python 3.11 or newer and make; everything else is installed into $(VENV).
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
DEMO    = build/demo

# Each target installs only the extras it needs, once per change of pyproject.toml.
CORE   = $(VENV)/.installed-core
TEST   = $(VENV)/.installed-test
DEV    = $(VENV)/.installed-dev
PARITY = $(VENV)/.installed-parity

.PHONY: help test demo lint types parity format ci clean

help:
	@sed -n '1,6s/^# \{0,1\}//p' Makefile

test: $(TEST)
	$(BIN)/python -m pytest

demo: $(CORE)
	rm -rf $(DEMO)
	$(BIN)/python benchmarks/make_small_checkpoint.py $(DEMO)/model --text $(DEMO)/text.txt
	$(BIN)/mesp-ref finetune --model $(DEMO)/model --data $(DEMO)/text.txt --out $(DEMO)/adapter

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEV)
	$(BIN)/mypy

parity: $(PARITY)
	$(BIN)/python -m pytest tests/parity -m "slow or not slow"

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

$(TEST) $(DEV) $(PARITY): $(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

$(TEST):   EXTRAS = test
$(DEV):    EXTRAS = dev,convert
$(PARITY): EXTRAS = test,parity,convert
