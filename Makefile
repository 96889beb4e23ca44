# make demo: install into .venv and ask the demo model. make test: install what tests need, then check everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint types unit soak clean

demo: $(VENV)/.installed
	$(BIN)/k2lite info k2lite/demo
	$(BIN)/k2lite run -p "How many centimeters are 12 meters?"
	$(BIN)/python tools/demo_tool_call.py

test: lint types unit

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

# Files of tests side by side, a few at most for memory's sake. Torch has a thread in each: two on a core only wait.
unit soak: export OMP_NUM_THREADS := 1
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadfile

unit: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# The full counts of the seeded samples that `make test` takes.
soak: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --soak

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("k2lite needs Python 3.11 or newer, found " + sys.version.split()[0] + "; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
