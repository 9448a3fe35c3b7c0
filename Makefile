# Everything runs in .venv, made on first use and renewed when pyproject.toml or constraints.txt changes.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c constraints.txt
MADE := $(VENV)/.made
USE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
# Processes that share the tests, each on one thread.
WORKERS ?= 2
# The programs that tests start need not compile the package each.
unexport PYTHONDONTWRITEBYTECODE
# Waiting OpenMP threads sleep early, as customize/openmp.py explains.
export GOMP_SPINCOUNT ?= 10000

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo llm test test-slow test-hostile mutants lint venv storybook stickers bench bench-gpu clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(USE)  ## learn, merge and draw concepts in the bundled miniature world
	$(PY) -m customize demo

llm: $(DEV)  ## download a small language model that rewrites prompts (93 MB, 515 MB converted)
	$(PY) scripts/download_llm.py

test: lint  ## lint, then the tests that take seconds
	$(PY) -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(DEV)  ## the tests that take minutes
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -m slow

test-hostile: $(DEV)  ## damaged files, killed processes and full disks, with counts; half an hour
	$(PY) -m pytest -m hostile -s tests/hostile tests/training/test_stopped.py

# Such as: make mutants MODULES=customize/core/lowrank.py
mutants: $(DEV)  ## change core, merges and state line by line and list what no test notices; hours
	$(PY) scripts/mutants.py --jobs $(WORKERS) $(MODULES)

lint: $(DEV)  ## style, import direction and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports
	$(PY) -m mypy

venv: $(MADE)  ## an empty environment, such as to choose a build of torch

storybook: $(USE)  ## train the bundled base model and its judges anew
	$(PY) scripts/train_storybook.py

stickers: $(DEV)  ## install the artwork of the stickers (16 MB by npm, 38 MB in the cache)
	$(PY) scripts/install_stickers.py

bench: $(USE)  ## run every benchmark but the GPU's, one after another
	@set -e; for file in $(filter-out %/gpu.py,$(wildcard scripts/bench/[!_]*.py)); do \
		echo "== $$file"; $(PY) "$$file"; done

bench-gpu: $(USE)  ## measure what wants a CUDA device, in 8 minutes
	$(PY) scripts/bench/gpu.py

clean:  ## remove caches, build outputs and the environment
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis .mutants
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The note of the interpreter is written once .venv is whole: one that was cut off while it was made
# has none and is made anew, and so is one of another interpreter than the PYTHON that was named.
WHICH := import sys; print(sys.version.split()[0], sys.base_prefix)
NAMED := $(filter-out file,$(origin PYTHON))

$(MADE): FORCE
	@if [ ! -f $@ ] && [ -f $(USE) ]; then \
		$(PY) -c '$(WHICH)' > $@ && touch -r pyproject.toml $@; fi  # made before there were notes
	@if [ -f $@ ] && [ -z "$(NAMED)" ]; then exit 0; fi; \
	if [ -f $@ ] && [ "$$($(PYTHON) -c '$(WHICH)' 2>&1)" = "$$(cat $@)" ]; then exit 0; fi; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "customize needs Python 3.11 or newer, and '$(PYTHON)' is not." >&2; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }; \
	echo "$(PYTHON) -m venv --clear $(VENV)"; \
	$(PYTHON) -m venv --clear $(VENV) && $(PYTHON) -c '$(WHICH)' > $@

.PHONY: FORCE
FORCE:

# torch goes first and alone: the largest download fails early, and nothing later can ask for another.
$(USE): pyproject.toml constraints.txt $(MADE)
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt $(MADE)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $(USE) $@
