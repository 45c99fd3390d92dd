# The commands that README and CI use. Everything lives in .venv; `make clean` removes it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help train test test-slow lint format clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]"
	touch $@

train: $(VENV)/.installed ## Train the demo: a language model with 262,144 experts, ten minutes on two cores
	$(BIN)/million-experts train --preset demo --resume

test: lint ## Lint, check types, run the tests (some minutes)
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed ## Run what takes longer: the README's training commands, many kills of a run
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed ## Check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
