# `make demo` and `make test` do everything on a fresh machine with Python 3.11+; the rest is for developers.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKSPACE ?= workspace

.PHONY: help demo test check up format lock clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    set up, then run the main job on an embedded default (workspace: $(WORKSPACE)/demo)"
	@echo "make test    set up, then run all tests, the demo end to end included"
	@echo "make check   ruff, mypy --strict, import-linter, and the fast tests"
	@echo "make up      the daemon on $(WORKSPACE)"

$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Caddie needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Torch for CUDA brings Triton, other builds of it do not: there the tests of Caddie's kernels need its interpreter.
$(VENV)/triton: $(VENV)/installed tests/requirements.lock
	$(BIN)/python -c 'import triton' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/requirements.lock
	@touch $@

demo: $(VENV)/installed
	$(BIN)/caddie demo --workspace $(WORKSPACE)/demo

up: $(VENV)/installed
	$(BIN)/caddie up --workspace $(WORKSPACE)

test: $(VENV)/triton
	$(BIN)/python -m pytest

# FAST_TESTS=no leaves the tests to a `make test` that follows.
FAST_TESTS ?= yes
check: $(VENV)/triton
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
ifneq ($(FAST_TESTS),no)
	$(BIN)/python -m pytest -m "not e2e"
endif

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pin anew what pyproject.toml allows, in a clean environment. torch stays where it is until it is moved by hand.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet torch==2.13.0
	build/lock/bin/python -m pip install --quiet '.[dev]'
	( head -n 2 requirements.lock; build/lock/bin/python -m pip freeze --all --exclude pip --exclude caddie \
		| sed 's/+.*//' | LC_ALL=C sort -f ) > build/requirements.lock
	mv build/requirements.lock requirements.lock

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
