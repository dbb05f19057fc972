# Commands for a machine with Python 3.11 or newer and nothing else; each sets up .venv by itself.
#   make train   trains a small RWKV-7 on the source text of Python's standard library and samples from it
#   make test    runs the linter, the type checker and the tests, and then
#   make test-devices    compiles the kernels for GPUs and TPUs that need not be there, in .venv-devices (Linux, x86-64)
# and by itself, since it installs PyTorch,
#   make test-peers      holds our models and training steps against the official ones, in .venv-peers

PYTHON ?= python3
BIN := .venv/bin
DEVICES := .venv-devices/bin

.PHONY: train test test-devices test-peers

train: .venv/installed
	$(BIN)/python train.py configs/python_stdlib.py

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 15
	$(MAKE) test-devices

# There are no such compilers for other machines.
ifeq ($(shell uname -sm),Linux x86_64)
test-devices: .venv-devices/installed
	$(DEVICES)/python -m pytest --numprocesses 2 -m 'devices and not long' tests/devices
else
test-devices:
	@echo 'test-devices: needs Linux on x86-64'
endif

test-peers: .venv/installed-dev .venv-peers/installed
	$(BIN)/python -m pytest -m peers tests

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# torch first, or another package asks for one built for GPUs.
.venv-peers/installed: | .venv/bin/python
	.venv/bin/python -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check numpy rwkv==0.8.32
	touch $@

.venv-devices/installed: pyproject.toml constraints.txt constraints-devices.txt | .venv/bin/python
	.venv/bin/python -m venv .venv-devices
	$(DEVICES)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . pytest pytest-xdist
	$(DEVICES)/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-devices.txt
	touch $@
