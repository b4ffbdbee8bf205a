# Kvorum. Every target works in a fresh clone: `venv` installs what is needed into .venv.

PYTHON ?= python3
JOBS ?= 2
SEEDS ?= 200
NIGHTLY_SEEDS ?= 20000
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow coverage check fmt bench sim nightly plants bank realdata clean

help:  ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "  variables: PYTHON=$(PYTHON) JOBS=$(JOBS) SEEDS=$(SEEDS) NIGHTLY_SEEDS=$(NIGHTLY_SEEDS) ARGS=$(ARGS)"

venv: $(STAMP)  ## create .venv and install Kvorum with its development tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Kvorum needs Python 3.11 or later; try: make venv PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: venv  ## a local cluster of three nodes that tries itself; Ctrl-C stops it
	$(BIN)/kvstore demo $(ARGS)

test: venv  ## the tests that run in minutes
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q $(ARGS)

test-slow: venv  ## the tests marked slow
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q -m slow $(ARGS)

coverage: venv  ## branch coverage of `make test`
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q --cov --cov-report=term $(ARGS)

check: venv  ## format, lint, types, import contracts, tidy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.tidy

fmt: venv  ## format, and apply the safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: venv  ## measure throughput and latency on this machine
	$(BIN)/python -m tools.bench $(ARGS)

sim: venv  ## whole clusters under simulated faults, SEEDS of them
	$(BIN)/python -m tools.simulate --seeds $(SEEDS) --jobs $(JOBS) $(ARGS)

nightly: venv  ## NIGHTLY_SEEDS simulated clusters; rare paths that none of them took are a failure
	$(BIN)/python -m tools.simulate --seeds $(NIGHTLY_SEEDS) --jobs $(JOBS) --require-probes $(ARGS)

plants: venv  ## every planted bug must be caught; writes the table in tests/sim/README.md
	$(BIN)/python -m tests.sim.plant_table --jobs $(JOBS) $(ARGS)

bank: venv  ## transfers between accounts while nodes die; no money may be lost
	$(BIN)/python -m tools.bank $(ARGS)

realdata: venv  ## the Unicode character database through three nodes that die; every row compared
	$(BIN)/python -m tools.realdata $(ARGS)

clean:  ## remove .venv, caches and build output
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.* htmlcov
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
