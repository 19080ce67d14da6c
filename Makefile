# make search: install, then the whole job on the built-in data.   make test: install, then all tests.
PYTHON ?= python3
BIN = .venv/bin
export NO_ALBUMENTATIONS_UPDATE = 1

.PHONY: search install install-dev quick test lint types check soak audit bench clean

# The whole job on the built-in data.
search: .venv/installed
	$(BIN)/python tune/search.py

# What a search needs.
install: .venv/installed

# The same, and what tests, lint and types need.
install-dev: .venv/installed-dev

# The tests that start neither Ray nor a browser nor another program, but for a few slow ones.
quick: .venv/installed-dev
	$(BIN)/python -m pytest -m "not ray and not browser and not server and not slow"

# All tests, with the slowest ten and the reasons of skips.
test: .venv/installed-dev
	$(BIN)/python -m pytest --durations=10 -rs

# Style and format.
lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Annotations.
types: .venv/installed-dev
	$(BIN)/mypy

# All of it, before a commit.
check: lint types test

# Forty searches, each with a fault while it runs, and resumed.
soak: .venv/installed-dev
	$(BIN)/python tests/soak.py --rounds 40 --seed 0

# Known vulnerabilities of the pinned versions. Needs a network.
audit:
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet pip-audit
	.audit/bin/pip-audit --requirement requirements.lock --requirement requirements-dev.lock --no-deps --disable-pip

# The benchmarks that need no GPU and no data.
bench: .venv/installed-dev
	$(BIN)/python tests/benchmarks/bench_input.py
	$(BIN)/python tests/benchmarks/bench_frozen.py
	$(BIN)/python tests/benchmarks/bench_scale.py
	$(BIN)/python tests/benchmarks/bench_overhead.py
	$(BIN)/python tests/benchmarks/bench_trials.py
	$(BIN)/python tests/benchmarks/bench_nodes.py

# The environment and what tools leave. Studies stay.
clean:
	rm -rf .venv .audit build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.venv/installed-dev: requirements-dev.lock .venv/installed
	$(BIN)/python -m pip install --quiet --requirement requirements.lock --requirement requirements-dev.lock
	touch $@
