# Every target sets up what it needs: the first one to run creates .venv.
PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-slow lint format docs check-docs bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12       interpreter for .venv (3.11 or newer; default python3)"
	@echo "  PYTEST_ARGS='-k lm2'    further arguments for test and test-slow"
	@echo "  JOBS=2                  test processes"
	@echo "  MNEMIC_DATA=DIR         folder with data sets, handed on to every command"

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON) not found. Name a Python 3.11 or newer: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: mnemic needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)." >&2; \
	  echo "      Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Tests and checks never touch the network, and leave the cores to the test processes.
test test-slow check-docs: export OMP_NUM_THREADS = 1
test test-slow check-docs: export HF_HUB_OFFLINE = 1
test test-slow check-docs: export TOKENIZERS_PARALLELISM = false

demo: $(STAMP)  ## show what a memory does, on a small model, on CPU
	$(BIN)/mnemic demo

test: lint docs check-docs  ## lint, docs and all tests but the slow ones
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

test-slow: $(STAMP)  ## the slow tests
	$(BIN)/python -m pytest -n $(JOBS) -m "slow and not gpu" --timeout 1800 $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff and basedpyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(STAMP)  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

check-docs: $(STAMP)  ## run the examples of README and docs, check tables and links
	$(BIN)/python tools/check_docs.py

bench: $(STAMP)  ## measure speed against the plain host, as ratios
	$(BIN)/python -m benchmarks.run

clean:  ## remove what was built; .venv stays
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis .coverage
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
