# Weft's commands. Each starts from a bare machine with Python 3.11 to 3.13 and sets up .venv by itself.
#
#   make train    the default recipe on this machine; RUN="key=value ..." changes it
#   make test     lint and the test suite; TESTS="tests/data -k packing" runs a part
#   make prove    the long proofs
#   make equality every mixer in every parallel layout against one process; writes its table into docs/parallelism.md
#   make mutants  every seeded defect, tried on the tests nearest to it; MUTANTS="data --workers 2" tries a part
#   make lint     style, types, import layers and file lengths only
#   make setup    everything that the commands above need, without running them
#   make lock     write requirements.lock anew from .venv
#   make clean    delete .venv and caches; runs and data stay

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
# Two targets that write one .venv at a time would break it.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: train test prove equality mutants lint setup lock clean
.DEFAULT_GOAL := train

VENV := .venv
# The oldest and the newest release that the kernels are compiled with; torch for CUDA brings its own.
TRITON := 3.6.0
TRITON_NEWEST := 3.9.0
BIN := $(VENV)/bin
RUN ?=
TESTS ?=
MUTANTS ?= --write bench/results/mutants.json

# Modules are compiled when first imported (below), which needs leave to write the result.
unexport PYTHONDONTWRITEBYTECODE
# Packages of the user's own Python must not shine through.
unexport PYTHONPATH
unexport PYTHONHOME
export PYTHONNOUSERSITE := 1

# --no-compile halves the time of the set-up: most modules of torch and transformers are never imported.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --no-compile \
	--constraint requirements.lock

train: $(VENV)/train.ready
	$(BIN)/python -m data.prepare
	$(BIN)/python -m train $(RUN)

# Files stay whole: what one sets up for its tests is set up once.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not prove and not interpreted and not equality" $(TESTS)

# Triton decides when it is imported whether kernels are interpreted or compiled: one process cannot do both.
prove: $(VENV)/test.ready $(VENV)/triton-$(TRITON_NEWEST).ready
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m interpreted tests/kernels tests/parallel
	$(BIN)/python -m kernels.compiled
	PYTHONPATH=$(VENV)/triton-$(TRITON_NEWEST) TRITON_DEFAULT_FP_FUSION=1 $(BIN)/python -m kernels.compiled
	$(BIN)/python -m pytest -n 2 --dist loadgroup --durations 15 -m prove $(TESTS)
	$(BIN)/python -m tests.mutants --count 30 --workers 2

# Two precisions by thirteen layouts by all mixers; `make prove` runs five in float64.
equality: $(VENV)/test.ready
	$(BIN)/python -m pytest -m equality tests/parallel/test_equality.py tests/parallel/test_zero_models.py
	$(BIN)/python -m bench.equality write

# In copies of the tree in a temporary directory. `make prove` tries thirty, each day others.
mutants: $(VENV)/test.ready
	$(BIN)/python -m tests.mutants $(MUTANTS)

lint: $(VENV)/test.ready
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	@awk 'FNR == 1 { count++ } \
	  FNR == (FILENAME ~ /^\.\/kernels\/.*\/triton\.py$$/ ? 901 : 601) \
	    { print "lint: " FILENAME ": longer than " FNR - 1 " lines; split it by idea"; long = 1 } \
	  END { if (!long) print "lint: " count " Python files are within their length"; exit long }' \
	  $$(find . -name .venv -prune -o -name runs -prune -o -name '*.py' -print)

setup: $(VENV)/test.ready $(VENV)/train.ready

# Python with venv: the first of the usual names that starts, has a version that fits and brings pip along.
$(BIN)/python:
	@for name in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	  if "$$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	    2>/dev/null; then \
	    echo "setup: $(VENV) with $$("$$name" -V) ($$name)"; "$$name" -m venv --clear $(VENV); exit 0; fi; \
	done; \
	echo "setup: needs Python 3.11 to 3.13 with venv (Debian: apt-get install python3-venv), found none" \
	  "as python3, python3.13, python3.12 or python3.11; name one by make PYTHON=/path/to/python" >&2; exit 1

# torch comes first and alone: no other package can then pull in another build of it.
$(VENV)/torch.ready: requirements.lock | $(BIN)/python
	@echo "setup: torch (minutes where it brings CUDA)"
	@$(PIP) "$$(grep '^torch==' requirements.lock)"
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) triton==$(TRITON)
	@touch $@

$(VENV)/triton-$(TRITON_NEWEST).ready: $(VENV)/torch.ready
	@echo "setup: triton $(TRITON_NEWEST) beside the other"
	@$(PIP) --no-deps --target $(VENV)/triton-$(TRITON_NEWEST) triton==$(TRITON_NEWEST)
	@touch $@

$(VENV)/train.ready: pyproject.toml requirements.lock $(VENV)/torch.ready
	@echo "setup: what training needs"
	@$(PIP) --editable .
	@touch $@

# What the tests need includes what training needs.
$(VENV)/test.ready: pyproject.toml requirements.lock $(VENV)/torch.ready
	@echo "setup: what training and tests need"
	@$(PIP) --editable ".[test]"
	@touch $@ $(VENV)/train.ready

# CUDA packages are left out: torch pins its own. A build suffix (+cpu) would name one machine's build.
lock: $(VENV)/test.ready
	@{ grep '^#' requirements.lock; $(BIN)/python -m pip freeze --exclude-editable \
	  | grep -viE '^(nvidia-|cuda-|triton)' | sed 's/+[a-z0-9.]*$$//' | LC_ALL=C sort -f; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
