# Two commands: `make demo` and `make test`. Each makes its environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test quick test-full test-minimum lint types unit notebooks bench links pictures reference lab clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	@test -x $(BIN)/python || (echo "making $(VENV)"; $(PYTHON) -m venv $(VENV))
	@echo "installing packages (a few minutes, the first time only)"
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -q torch==2.13.0
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -q -e '.[notebooks,dev]'
	@touch $(STAMP)

demo: setup
	$(BIN)/workbench demo --out runs/demo

test: lint types unit notebooks

# before a commit: what trains nothing
quick: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not full' tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup links
	$(BIN)/mypy

# the package as a wheel has it, of links into the tree: mypy follows no __path__
links:
	@rm -rf build/links && mkdir -p build/links/workbench
	@ln -s $(CURDIR)/workbench/* $(CURDIR)/hooks $(CURDIR)/figures build/links/workbench/

unit: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

# those that train longest are executed by test-full
LONG := $(wildcard notebooks/04*.ipynb notebooks/05*.ipynb notebooks/06*.ipynb)

notebooks: setup
	$(BIN)/python -m pytest -n 2 --nbmake --nbmake-timeout=900 $(filter-out $(LONG),$(wildcard notebooks/*.ipynb))

test-full: test test-minimum
	$(BIN)/python -m pytest -m full tests
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=1800 $(LONG)

# the oldest declared versions, and the fast tests under them
OLDEST := .venv-minimum
OLD := $(OLDEST)/bin/python

$(OLDEST)/.installed: pyproject.toml constraints-minimum.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	@PIP_CONSTRAINT=constraints-minimum.txt $(OLD) -m pip install --disable-pip-version-check -q torch==2.13.0
	@PIP_CONSTRAINT=constraints-minimum.txt $(OLD) -m pip install --disable-pip-version-check -q -e '.[dev]'
	@touch $@

test-minimum: $(OLDEST)/.installed
	$(OLD) -m pytest -n 2 --dist loadfile -m 'not slow and not full' tests

bench: setup
	$(BIN)/python tests/benchmarks/run.py --out bench.json

reference: setup
	$(BIN)/python docs/reference.py
	$(BIN)/python docs/tables.py

pictures: setup
	$(BIN)/python docs/pictures.py

lab: setup
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf runs bench.json $(OLDEST) .pytest_cache .mypy_cache .ruff_cache
