# `make help` says what there is. Windows, or no make: README.md has the same in three lines.
PYTHON ?= python3
PY := .venv/bin/python
# Added to the command line of tools/run.py: make run ARGS="--lessons 00 --set SEED=7"
ARGS ?=
# Before a test: every process, notebook kernels too, is refused a network, and a claim that does not hold is an error.
# Not exported for the whole target, whose first step is the install.
GUARDED := PYTHONPATH="$(CURDIR)/tests/guard" COURSE_STRICT=1

.DEFAULT_GOAL := help
.PHONY: help setup run lab test test-imagenet notebooks bench clean

help:  ## this list
	@awk -F ':.*## +' '/^[a-z-]+:.*## /{printf "%-15s %s\n", $$1, $$2}' Makefile

setup: .venv/.stamp  ## make .venv and install into it; a second call installs nothing

# The stamp comes last, so that an install that was cut off is done again.
.venv/.stamp: requirements.txt requirements-dev.txt constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: install Python 3.11 or newer, or name yours: make setup PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, this is ' + sys.version.split()[0] + ': name another with make setup PYTHON=...')"
	@rm -f $@
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	$(PY) -m pip install --disable-pip-version-check --no-deps -e .
	@$(PY) -c "import torch, torchvision; torchvision.ops.nms" || { echo "torch and torchvision do not fit together: both must come from one index. Remove .venv and run make setup again." >&2; exit 1; }
	@touch $@

run: setup  ## execute the lessons; executed notebooks and report.html go to build/
	$(PY) tools/run.py $(ARGS)

lab: setup  ## open the first lesson in JupyterLab
	$(PY) -m jupyterlab notebooks/00_start_here.ipynb

test: setup  ## style, types, unit tests, student notebooks (nbval), solved notebooks
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
	$(GUARDED) $(PY) -m pytest --cov
	$(GUARDED) $(PY) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=600 -p no:cacheprovider notebooks/*.ipynb
	$(GUARDED) $(PY) -m pytest -m notebooks

test-imagenet: setup  ## notebooks in the imagenet world, on random networks and pictures served from this machine
	$(GUARDED) $(PY) -m pytest -m imagenet

notebooks: setup  ## make what is derived: notebooks, solutions, the README's table
	$(PY) tools/build.py

bench: setup  ## measure speed against other ways, and write build/bench.json
	TQDM_DISABLE=1 $(PY) tools/bench.py

clean:  ## remove what can be made again, except .venv
	rm -rf build runs .pytest_cache .mypy_cache .ruff_cache .coverage *.egg-info
