# `make` alone lists what there is.

PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
JOBS ?= 2
UV ?= uv
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two workers of one thread each are faster than two that fight for the same cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo quick lint format test test-slow test-slurm test-browser lock clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## create .venv and install the pinned packages and this project (about 6 GB)

demo: install  ## install, then run the cluster sweep on simulated data; results go to runs/
	$(BIN)/python -m benchmark.sweep clusters $(ARGS)

quick: install  ## the same with three points, fewer images and steps
	$(BIN)/python -m benchmark.sweep clusters --quick $(ARGS)

lint: install  ## ruff, import-linter, mypy
	$(BIN)/python -m ruff check
	$(BIN)/lint-imports
	$(BIN)/python -m mypy

format: install  ## rewrite the code in the project's format
	$(BIN)/python -m ruff check --select I --fix
	$(BIN)/python -m ruff format

test: install lint  ## lint, then all tests but the slow ones
	$(PYTEST) --durations=15 $(ARGS)

test-slow: install  ## the slow tests
	$(PYTEST) --durations=15 -m 'slow and not slurm and not browser' $(ARGS)

test-slurm: install  ## tests on a real Slurm (Debian, root; installs its packages); the slow ones too: ARGS="-m slurm"
	@$(BIN)/python tests/slurm/cluster.py install
	$(ONE_THREAD) $(BIN)/python -m pytest -m 'slurm and not slow' tests/slurm --durations=15 $(ARGS)

test-browser: install  ## the site's tests in a real Chromium (Debian's; as root it is installed)
	@$(BIN)/python tests/browser/chromium.py install
	$(ONE_THREAD) $(BIN)/python -m pytest -m browser tests/browser --durations=5 $(ARGS)

lock:  ## resolve pyproject.toml into requirements.lock (needs uv); upgrade with ARGS=--upgrade
	@command -v $(UV) >/dev/null || { echo "error: make lock needs uv (pip install uv, or make lock UV=/path/to/uv)" >&2; exit 1; }
	$(UV) pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-header --quiet --output-file requirements.lock $(ARGS)

clean:  ## delete caches and build products; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find benchmark leaderboard methods metrics tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is newer than both files once everything in them is installed; then this costs nothing.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))" 2>/dev/null || { \
		echo "error: Python 3.11 or 3.12 is needed, and $(PYTHON) is '$$($(PYTHON) --version 2>&1)'; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv" >&2; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP) install --require-hashes --no-deps --no-compile --use-pep517 -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@# pip compiles on one core, and Python not at all where it may not write later: then torch alone takes 3 s to import.
	-@$(BIN)/python -m compileall -qq -j $(JOBS) .venv/lib
	@touch $@
