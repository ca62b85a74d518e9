# make demo   the whole line on this machine: real text in, an answering endpoint out; stops all it started
# make up     the same, but leave the cluster and the endpoint running;  make down stops them
# make test   every test, in two processes: they mostly wait for Ray;  make quick  those without Ray
# make check  style and types

PYTHON ?= python3
BIN := .venv/bin
LINE := $(BIN)/python -m powerhouse.cluster.line
CONFIG := --config jobs/configs/demo.yaml

.PHONY: demo up down test quick check clean

demo: .venv/installed
	@$(LINE) demo $(CONFIG) $(ARGS)

up: .venv/installed
	@$(LINE) up $(CONFIG) $(ARGS)

down: .venv/installed
	@$(LINE) down

test: .venv/tested
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

quick: .venv/tested
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: .venv/tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Bytecode is written at the first import: all of it at once would take longer than the install, and none of it
# would have every process of a cluster compile torch and Ray anew.
unexport PYTHONDONTWRITEBYTECODE

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
