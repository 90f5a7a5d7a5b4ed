# Two commands on a fresh machine: `make demo` (the whole pipeline, no GPU needed) and `make test`.
# `make test-vllm` tests serving with vLLM, in an environment of its own.

# A Python that is new enough and can make virtual environments.
CHECK := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.13; do \
  $$python -c '$(CHECK)' 2>/dev/null && { command -v $$python; break; }; done)
# Where pip finds torch. On a machine without a GPU, PyTorch's CPU index saves gigabytes:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
CORES ?= 2

VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint envs/constraints.txt
.PHONY: help demo test test-vllm lint format clean

help:  ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(VENV)/demo.done: pyproject.toml envs/constraints.txt
	@"$(PYTHON)" -c '$(CHECK)' 2>/dev/null || { echo "error: Python 3.11 or newer with venv is needed." \
	  "Debian and Ubuntu: apt install python3 python3-venv; elsewhere: python.org, pyenv or conda." \
	  "Then run make again, with PYTHON=/path/to/python3 if it is not on the PATH."; exit 1; }
	@echo "Setting up $(VENV) (once; PyTorch is the large part) ..."
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/test.done: $(VENV)/demo.done
	@$(PIP) --editable ".[demo,dev,cuda]"
	@touch $@

# vLLM pins a build of PyTorch for CPUs. What else of PyTorch comes along is of another build, and text needs none of it.
VLLM_VENV := .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip
$(VLLM_VENV)/test.done: pyproject.toml envs/vllm.txt
	@"$(PYTHON)" -c '$(CHECK)'
	@echo "Setting up $(VLLM_VENV) (once; three minutes) ..."
	@test -x $(VLLM_VENV)/bin/python || "$(PYTHON)" -m venv $(VLLM_VENV)
	@$(VLLM_PIP) install --quiet --disable-pip-version-check \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --requirement envs/vllm.txt
	@$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@$(VLLM_PIP) install --quiet --disable-pip-version-check --editable .
	@touch $@

demo: $(VENV)/demo.done  ## set up and run the whole pipeline on the embedded model
	@. $(BIN)/activate && snakemake --cores $(CORES) && cat results/demo-moe/logs/report.log

test: $(VENV)/test.done  ## run the tests
	@. $(BIN)/activate && python -m pytest -n $(CORES) --dist loadfile

test-vllm: $(VLLM_VENV)/test.done  ## serve packed checkpoints with vLLM, on the CPU
	@$(VLLM_VENV)/bin/python -m pytest -n $(CORES) --dist loadfile tests/serving

lint: $(VENV)/test.done  ## check style, types and the workflow
	@. $(BIN)/activate && ruff check . && ruff format --check . && snakefmt --check Snakefile rules && mypy

format: $(VENV)/test.done  ## rewrite files in the project's style
	@. $(BIN)/activate && ruff check --fix . && ruff format . && snakefmt Snakefile rules

clean:  ## remove results and the virtual environments
	rm -rf $(VENV) $(VLLM_VENV) .snakemake results/*/ results/summary.csv results/report.html
