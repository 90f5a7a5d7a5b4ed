# Two commands on a fresh machine: `make demo` (the whole pipeline, no GPU needed) and `make test`.

PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
# Where pip finds torch. On a machine without a GPU, PyTorch's CPU index saves gigabytes:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
CORES ?= 2

VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint envs/constraints.txt
# Stops before any download when Python is too old or has no venv, and says how to get them.
CHECK := import sys, importlib.util as u; \
  sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed, this is %d.%d; install it (Debian: apt install python3 python3-venv; or pyenv install 3.12) and run make with PYTHON=/path/to/python3" % sys.version_info[:2]); \
  u.find_spec("venv") and u.find_spec("ensurepip") or sys.exit("error: this Python has no venv module; Debian and Ubuntu: apt install python3-venv")

.PHONY: help demo test lint format clean

help:  ## show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(VENV)/demo.done: pyproject.toml envs/constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no python3 found; install Python 3.11 or newer with venv"; exit 1; }
	@"$(PYTHON)" -c '$(CHECK)'
	@echo "Setting up $(VENV) (once; PyTorch is the large part) ..."
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/test.done: $(VENV)/demo.done
	@$(PIP) --editable ".[demo,dev,cuda]"
	@touch $@

demo: $(VENV)/demo.done  ## set up and run the whole pipeline on the embedded model
	@. $(BIN)/activate && snakemake --cores $(CORES) && cat results/demo-moe/logs/report.log

test: $(VENV)/test.done  ## run the tests
	@. $(BIN)/activate && python -m pytest -n $(CORES) --dist loadfile

lint: $(VENV)/test.done  ## check style, types and the workflow
	@. $(BIN)/activate && ruff check . && ruff format --check . && snakefmt --check Snakefile rules && mypy

format: $(VENV)/test.done  ## rewrite files in the project's style
	@. $(BIN)/activate && ruff check --fix . && ruff format . && snakefmt Snakefile rules

clean:  ## remove results and the virtual environment
	rm -rf $(VENV) .snakemake results/*/ results/summary.csv results/report.html
