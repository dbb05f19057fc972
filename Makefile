# Commands for a machine with Python 3.11, 3.12 or 3.13 and nothing else; each sets up .venv by itself, with the versions
# of constraints/ for that Python: make test PYTHON=python3.12.
#   make train   trains a small RWKV-7 on the source text of Python's standard library and samples from it
#   make test    runs the linter, the type checker and the tests, and then
#   make test-devices    compiles the kernels for GPUs and TPUs that need not be there, in .venv-devices (Linux, x86-64)
# and by themselves
#   make test-newest     runs a tenth of the tests on another Python, in .venv-newest: make test-newest NEWEST=python3.13
#   make test-peers      holds our models and training steps against the official ones, our evaluations against
#                        lm-eval's, adapters against peft, GGUF files against llama.cpp, and folders against rwkv7-hf,
#                        in .venv-peers (it has PyTorch)

PYTHON ?= python3
BIN := .venv/bin
DEVICES := .venv-devices/bin
NEWEST ?= python3.13
# Most of what is installed is never imported: compiling it to bytecode, a third of the time, is left to what imports it.
PIP := python -m pip install --quiet --disable-pip-version-check --no-compile

version_of = $(or $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])'),unknown)
VERSION := $(call version_of,$(firstword $(wildcard $(BIN)/python) $(PYTHON)))
CONSTRAINTS := constraints/$(VERSION).txt
ifeq ($(origin PYTHON),command line)
ifneq ($(call version_of,$(PYTHON)),$(VERSION))
$(error .venv has Python $(VERSION), PYTHON is $(call version_of,$(PYTHON)): remove .venv, .venv-devices and .venv-peers)
endif
endif

# A tenth of the tests that touches every package, above all what releases of JAX and Flax have changed before.
NEWEST_TESTS := $(addprefix tests/,test_constraints.py test_imports.py test_plan_command.py \
	cli/test_doctor.py config data/tokens inference/test_engine.py inference/test_session_store.py \
	kernels/test_definitions.py kernels/test_lowering.py models/test_modules.py models/test_tabulate.py \
	parallel/test_mesh.py parallel/test_rules.py training/test_checkpoints.py training/test_optimizer.py \
	weights/test_pretrained.py weights/test_safetensors.py)

# Processes that tests start, a hundred of them, load the project's bytecode rather than compile it again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: train test types test-devices test-newest test-peers

train: .venv/installed
	$(BIN)/python train.py configs/python_stdlib.py

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --jobs 2 types $(INSTALLED_DEVICES)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 40 -rs
	$(MAKE) test-devices

types: .venv/installed-dev
	$(BIN)/pyright

# There are no such compilers for other machines; constraints/ has those of one version of JAX.
ifeq ($(shell uname -sm) $(VERSION),Linux x86_64 3.11)
INSTALLED_DEVICES := .venv-devices/installed
test-devices: $(INSTALLED_DEVICES)
	$(DEVICES)/python -m pytest --numprocesses 2 -rs -m 'devices and not long' tests/devices
else
test-devices:
	@echo 'test-devices: left out, needs Linux on x86-64 and Python 3.11 (here: $(shell uname -sm), $(VERSION))'
endif

test-newest: .venv-newest/installed
	.venv-newest/bin/python -m pytest --numprocesses 2 --dist worksteal -rs $(NEWEST_TESTS)

test-peers: .venv/installed-dev .venv-peers/installed
	$(BIN)/python -m pytest -rs -m peers tests

.venv/bin/python: | $(CONSTRAINTS)
	$(PYTHON) -m venv .venv

constraints/%.txt:
	@echo 'Python $* (PYTHON=$(PYTHON)): constraints/ has no versions of packages for it: make PYTHON=python3.12' >&2
	@exit 1

.venv/installed: pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	$(BIN)/$(PIP) -c $(CONSTRAINTS) -e .
	touch $@

.venv/installed-dev: pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	$(BIN)/$(PIP) -c $(CONSTRAINTS) -e '.[dev]'
	touch .venv/installed $@

# torch first, or another package asks for one built for GPUs.
.venv-peers/installed: | .venv/bin/python
	.venv/bin/python -m venv .venv-peers
	.venv-peers/bin/$(PIP) torch==2.13.0
	.venv-peers/bin/$(PIP) numpy rwkv==0.8.32 peft==0.21.2 cyllama==0.2.18 rwkv7-hf==0.9.0 transformers==5.24.0
	.venv-peers/bin/$(PIP) -c $(CONSTRAINTS) -e . lm-eval==0.4.13
	touch $@

.venv-devices/installed: pyproject.toml $(CONSTRAINTS) constraints/devices-3.11.txt | .venv/bin/python
	.venv/bin/python -m venv .venv-devices
	$(DEVICES)/$(PIP) -c $(CONSTRAINTS) -e . pytest pytest-xdist
	$(DEVICES)/$(PIP) --no-deps -r constraints/devices-3.11.txt
	touch $@

# Apart, so that it can be made beside `make test`, which installs the project at the same time.
.venv-newest/packages: $(wildcard constraints/*.txt)
	$(NEWEST) -m venv --clear .venv-newest
	.venv-newest/bin/$(PIP) -r constraints/$(call version_of,$(NEWEST)).txt
	touch $@

.venv-newest/installed: pyproject.toml .venv-newest/packages
	.venv-newest/bin/$(PIP) -e '.[test]' \
		-c constraints/$(call version_of,$(NEWEST)).txt
	touch $@
