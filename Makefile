# Everything runs in .venv, which the first target that needs it creates from requirements.lock.
SHELL := bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The interpreter that the lock was made for, or else what there is.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Kernels and console scripts of the environment come first, whatever else is installed.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: help book pdf test lint lock pretrained sweep bench lab clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

# In steps that can be repeated: a broken install leaves no stamp, and the next make goes on.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	@$(PYTHON) -c 'import sys; sys.version_info[:2] == (3, 11) or print("warning: requirements.lock was made for Python 3.11, this is", sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

book: $(STAMP)  ## build the book into _build/html; warnings are errors
	$(BIN)/jupyter-book build . -n -W --keep-going
	$(BIN)/python tools/check_book.py

pdf: $(STAMP)  ## print the built book into _build/mmdd.pdf (needs Chromium, no LaTeX)
	$(BIN)/python tools/print_book.py

test: $(STAMP)  ## run all tests (JOBS=2 at a time), and the cheap chapters cell by cell
	$(BIN)/python -m pytest -q -n $(or $(JOBS),2) --dist loadfile
	$(BIN)/python -m pytest -q --nbval-lax notebooks/01_data.ipynb notebooks/04_linear_contrastive.ipynb

lint: $(STAMP)  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock:  ## resolve requirements.lock again (UPGRADE=1: take the newest versions)
	$(PYTHON) tools/lock.py $(if $(UPGRADE),--upgrade)

pretrained: $(STAMP)  ## train the small encoders in data/pretrained again
	for script in data/pretrained/make_*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

# Grids over photos need DATA, the folder of the photos; the others run on rendered scenes.
GRIDS := $(if $(DATA),$(wildcard sweeps/*.yaml),$(filter-out %photos.yaml sweeps/photos%,$(wildcard sweeps/*.yaml)))

sweep: $(STAMP)  ## run the grids in sweeps/ (SWEEP=sweeps/one.yaml, DATA=photos, JOBS=2)
	$(BIN)/python -m mmdd sweep $(or $(SWEEP),$(GRIDS)) --jobs $(or $(JOBS),1) $(if $(DATA),--data $(DATA))

bench: $(STAMP)  ## measure speed and memory; ends with the table of targets (BENCH=benchmarks/one.py for one)
	$(BIN)/python tools/bench.py $(or $(BENCH),$(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)))

lab: $(STAMP)  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

clean:  ## remove the built book and caches; results and .venv stay
	rm -rf _build build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
