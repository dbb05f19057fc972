# Two commands for a machine with Python 3.11 or newer and nothing else; each sets up .venv by itself.
#   make train   trains a small RWKV-7 on the source text of Python's standard library and samples from it
#   make test    runs the linter, the type checker and the tests

PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test

train: .venv/installed
	$(BIN)/python train.py configs/python_stdlib.py

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
