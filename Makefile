# make search: install, then the whole job on the built-in data.   make test: install, then all tests.
PYTHON ?= python3
BIN = .venv/bin
export NO_ALBUMENTATIONS_UPDATE = 1

.PHONY: search test install lint types check soak audit bench clean

search: .venv/installed
	$(BIN)/python tune/search.py

test: .venv/installed
	$(BIN)/python -m pytest

install: .venv/installed

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

check: lint types test

soak: .venv/installed
	$(BIN)/python tests/soak.py

audit:  # needs a network: known vulnerabilities of the pinned versions
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet pip-audit
	.audit/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip

bench: .venv/installed
	$(BIN)/python tests/benchmarks/bench_input.py
	$(BIN)/python tests/benchmarks/bench_frozen.py
	$(BIN)/python tests/benchmarks/bench_scale.py
	$(BIN)/python tests/benchmarks/bench_overhead.py
	$(BIN)/python tests/benchmarks/bench_trials.py
	$(BIN)/python tests/benchmarks/bench_nodes.py

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf .venv .audit build *.egg-info .pytest_cache .ruff_cache .mypy_cache
