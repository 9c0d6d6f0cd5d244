# `make quickstart` and `make test` work on a fresh machine with Python 3.10 to 3.13.
PYTHON ?= python3
unexport PYTHON  # scripts/torchrun_local.sh takes it for the Python to run, which is that of the environment
VENV ?= .venv
# torch goes first and alone: on a machine without a GPU point pip at PyTorch's CPU wheels to save gigabytes.
TORCH ?= torch==2.13.0
# The versions that CI runs with; empty: the newest ones that setup.py allows.
CONSTRAINTS ?= -c constraints.txt
BIN := $(VENV)/bin
# Another environment, with the Megatron-Core of Python 3.12 and newer, and the tests of what a new version can break.
STACK_VENV := .venv-stack
STACK_TESTS := tests/runtime/test_cpu.py tests/model/test_parity.py tests/model/test_recompute.py \
	tests/parallel/test_equal_to_one_process.py tests/parallel/test_expert_overlap.py tests/parallel/test_collectives.py \
	tests/training/test_pretrain.py tests/checkpoint/test_read_once.py \
	tests/checkpoint/test_golden.py tests/checkpoint/test_no_code.py tests/checkpoint/test_other_stack.py \
	tests/data/test_documents.py tests/plan/test_truth.py tests/plan/test_schedule.py tests/test_docs.py

# Two files of tests at a time; most tests wait, or keep one core busy. Empty: one.
AT_ONCE ?= -n 2 --dist loadfile

.PHONY: install quickstart test test-all test-stack check format clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet $(CONSTRAINTS) -e '.[dev]'
	touch $@

quickstart: install
	PATH="$(abspath $(BIN)):$$PATH" bash scripts/quickstart.sh

test: install
	$(BIN)/python -m pytest $(AT_ONCE) -m "not slow and not gpu" tests

test-all: install
	$(BIN)/python -m pytest $(AT_ONCE) tests

test-stack: install
	python=$$(scripts/newer_python.sh) && $(MAKE) install VENV=$(STACK_VENV) PYTHON="$$python"
	OTHER_PYTHON="$(abspath $(BIN))/python" $(STACK_VENV)/bin/python -m pytest $(AT_ONCE) -m "not slow and not gpu" $(STACK_TESTS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(STACK_VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
