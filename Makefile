# Two commands need nothing but Python and make: `make demo` and `make test`.
# Each makes its own virtual environment, with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUTPUT ?= demo

.PHONY: demo test test-slow lint format docs pictures build release-check clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# The demonstration needs little of what the tests need: only that, unless all of it is there already.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

demo: $(if $(wildcard $(VENV)/.ready),$(VENV)/.ready,$(VENV)/.demo)
	$(BIN)/python examples/digits.py --output $(OUTPUT)

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto -m 'not slow'

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site comes to build/site; a warning, such as a link to nowhere, is an error.
docs: $(VENV)/.ready
	$(BIN)/python tools/build_site.py

# Draws the pictures of the documentation anew; they are committed.
pictures: $(VENV)/.ready
	$(BIN)/python tools/draw_pictures.py

build: $(VENV)/.ready
	$(BIN)/python -m build

# Builds both archives, looks into them, and tests the wheel in an environment of its own; OPTIONS, such as
# OPTIONS='--only tests/test_compress.py', go to the script.
release-check: $(VENV)/.ready
	$(BIN)/python tools/release_check.py $(OPTIONS)

clean:
	rm -rf $(VENV) build dist demo .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
