# hone's commands. `make demo` and `make test` need only Python 3.11+; both make .venv first.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help demo test test-slow check format serve clean

help:        ## Show the commands.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## Fine-tune the base model on an example dataset and compare, end to end.
	$(BIN)/hone demo

test: $(READY)  ## Run the tests, JOBS files at a time: no GPU, no network, no model download.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: $(READY)  ## Run the end-to-end tests on the real model and the real clients.
	$(BIN)/python -m pytest -m slow

check: $(READY)  ## Lint, check the formatting and the types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## Mend what the linter can mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: $(READY)  ## Start the server on http://127.0.0.1:8000.
	$(BIN)/hone serve

clean:       ## Remove the environment and the caches (never .hone, which holds your data).
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache build *.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "hone needs Python 3.11 or newer; name one with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@
