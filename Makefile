# Two commands: `make read` to read the book, `make test` to check everything.
# A pip option goes through the environment, for example a CPU-only torch: make test PIP_EXTRA_INDEX_URL=...

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
export PYTHON VENV

.PHONY: help env read book labs lint test clean
.DEFAULT_GOAL := help

help: ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

env: $(READY) ## the environment alone, in .venv

$(READY): pyproject.toml constraints.txt .ci/setup.sh
	@sh .ci/setup.sh

read: $(READY) ## build the book, serve it on this machine, open it
	@$(PY) _ext/build.py --serve

book: $(READY) ## build the book; a warning is an error
	@$(PY) _ext/build.py

labs: $(READY) ## student and solved notebooks from labs/src
	@$(PY) -m effattn_lab.notebooks

lint: $(READY) ## style and types
	@echo "style ..." && $(PY) -m ruff check -q . && $(PY) -m ruff format -q --check .
	@echo "types ..." && $(PY) -m mypy

test: export OMP_NUM_THREADS = 1
test: lint ## every check: style, types, tests, labs, the book in a browser
	@$(PY) -m pytest -n 2 --dist worksteal

clean: ## remove what was built; the environment stays
	rm -rf _build dist .pytest_cache .mypy_cache .ruff_cache
