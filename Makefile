# One virtual environment for everything. PYTHON names the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The two ends of what pyproject.toml allows, each in an environment of its own.
PYTHON_NEWEST ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python) python3.12)
PYTHON_LOWEST ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.11*/bin/python) python3.11)
STACK_TESTS ?= tests
# Processes that share the tests, a file each at a time.
WORKERS ?= 2
PYTEST = -m pytest -q -n $(WORKERS) --dist loadfile --download-data

.PHONY: demo results test test-slow test-newest test-lowest audit lint format clean

demo: $(VENV)/.run  ## trains on real shopping data and prints the result
	$(BIN)/python -m experiments.train

results: $(VENV)/.run  ## the grid of docs/results: about 50 minutes on two quiet cores, goes on where it stopped
	$(BIN)/python -m experiments.ablate experiment=sharing_by_balancing data=movielens_1m,complete_journey seeds=5 name=sharing_by_balancing
	$(BIN)/python -m experiments.report outputs/ablate/sharing_by_balancing --out docs/results/sharing_by_balancing --formats md csv

test: $(VENV)/.test  ## the fast suite; fetches the data that it needs once
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python $(PYTEST) -m "not slow"

test-slow: $(VENV)/.test  ## the rest
	$(BIN)/python $(PYTEST) -m slow

test-newest: .venv-newest/bin/python  ## the fast suite on the newest releases; PYTHON_NEWEST names the interpreter (3.12)
	.venv-newest/bin/python -m pip install -q --upgrade --upgrade-strategy eager -e '.[test]'
	.venv-newest/bin/python -m pip list
	.venv-newest/bin/python $(PYTEST) -m "not slow" $(STACK_TESTS)

test-lowest: .venv-lowest/bin/python  ## the fast suite on the declared lower bounds; PYTHON_LOWEST names the interpreter (3.11)
	.venv-lowest/bin/python .ci/lower_bounds.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install -q -c .venv-lowest/constraints.txt -e '.[test]'
	.venv-lowest/bin/python -m pip list
	.venv-lowest/bin/python $(PYTEST) -m "not slow" $(STACK_TESTS)

audit: $(VENV)/.test  ## known advisories of what is installed and of the lower bounds; asks pypi.org or api.osv.dev
	$(BIN)/python -m pip install -q 'pip-audit>=2.7'
	$(BIN)/python .ci/audit.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-newest .venv-lowest outputs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

.venv-newest/bin/python:
	$(PYTHON_NEWEST) -m venv .venv-newest

.venv-lowest/bin/python:
	$(PYTHON_LOWEST) -m venv .venv-lowest

$(VENV)/.run: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@ $(VENV)/.run
