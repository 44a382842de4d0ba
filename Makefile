# Two commands do everything, set-up included: `make demo` and `make test`. `make test-vllm` is beside them.

SHELL := bash

PYTHON ?= python3
TORCH_INDEX ?=
VLLM_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed
VLLM := .venv-vllm
PIP_FLAGS := --no-compile $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# Each process runs whole test files or notebooks, the longest first (tests/conftest.py).
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Many containers set it, and without bytecode every process compiles torch and transformers anew (10 s).
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo lint check test test-vllm bench notebooks app clean

help: ## show this list
	@awk -F ': .*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=python3.12     the Python (3.11 or newer) that makes .venv; now: $(PYTHON)"
	@echo "  TORCH_INDEX=URL       take torch from this index, for example the small CPU-only build:"
	@echo "                        TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	@echo "  VLLM_INDEX=URL        where test-vllm finds torch for CPUs; now: $(VLLM_INDEX)"
	@echo "  WORKERS=2             processes that run tests side by side; each takes about 2 GB of memory"
	@echo "  ARGS='…'              more arguments for vqr1 demo, pytest or the benchmarks"

install: $(STAMP) ## set up .venv with everything (about 2 GB, a few minutes the first time)

# The stamp is written last, so an interrupted installation starts again. A TORCH_INDEX given later
# does not change an installed torch: `make clean` first. Files are compiled when first imported
# (--no-compile), which halves the time.
$(STAMP): pyproject.toml constraints.txt
	@set -o pipefail; \
	python=$(BIN)/python; [ -x $$python ] || python="$(PYTHON)"; \
	version=$$("$$python" -c 'import sys; print("%d.%d.%d" % tuple(sys.version_info)[:3])') || { \
	  echo "vqr1 needs Python 3.11 or newer, and '$$python' does not run. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	"$$python" -c 'import sys; sys.exit(tuple(sys.version_info)[:2] < (3, 11))' || { \
	  echo "vqr1 needs Python 3.11 or newer; '$$python' is Python $$version. Name a newer one: make PYTHON=python3.11" >&2; \
	  [ "$$python" != "$(BIN)/python" ] || echo "(.venv was made with it: make clean first)" >&2; exit 1; }; \
	echo "Installing vqr1 into .venv with Python $$version: about 2 GB, some minutes the first time."; \
	start=$$(date +%s); \
	[ -x $(BIN)/python ] || "$$python" -m venv --clear .venv || { \
	  echo "'$$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[notebooks,app,dev,scale,excel]' \
	  | awk '/^ *(Downloading|Using cached) .*\([0-9.]+ [MG]B\)/ {sub(/https?:[^ ]*\//, ""); print; fflush()} \
	         /^Installing collected/ {print "  Installing " NF - 3 " packages"; fflush()}' || exit 1; \
	touch $@; \
	echo "Installed in $$(( $$(date +%s) - start )) s."

demo: $(STAMP) ## the main job: evaluate, train by RL to rank, evaluate again (writes runs/demo/)
	$(BIN)/vqr1 demo $(ARGS)

lint: $(STAMP) ## check style and format of code and notebooks
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .

check: lint ## lint, and run the fast tests while you edit: no notebook, no browser
	$(PYTEST) -m "not slow and not browser" tests vqr1 $(ARGS)

test: $(STAMP) ## run all tests, notebooks too, offline
	$(PYTEST) $(ARGS)

# vLLM's own environment (requirements-vllm.txt). Engine and tests share one process: on a CPU each further
# one imports all of it again.
$(VLLM)/.installed: requirements-vllm.txt tools/vllm_environment.sh tools/torchvision_operators.py
	@tools/vllm_environment.sh "$(PYTHON)" "$(VLLM_INDEX)"

test-vllm: $(VLLM)/.installed ## run the tests of engine="vllm" with vLLM itself, on a CPU, in .venv-vllm
	HF_HUB_OFFLINE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_NO_USAGE_STATS=1 \
	  $(VLLM)/bin/python -m pytest -o addopts=-ra tests/engines/test_vllm_itself.py $(ARGS)

bench: $(STAMP) ## run the benchmarks, one by one
	@set -e; for script in tests/benchmarks/*.py; do \
	  [ -e "$$script" ] || continue; echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done

notebooks: $(STAMP) ## run the notebooks and solutions, and store their outputs in place
	$(BIN)/python tools/run_notebooks.py $(or $(ARGS),$(wildcard notebooks/*.ipynb notebooks/solutions/*.ipynb))

app: $(STAMP) ## a page to rate the pictures in a folder of yours: make app ARGS=FOLDER
	VQR1_FOLDER="$(ARGS)" HF_HUB_OFFLINE=1 $(BIN)/voila tools/app.ipynb

clean: ## remove .venv, .venv-vllm and caches (runs/ stays)
	rm -rf .venv .venv-vllm build dist *.egg-info .pytest_cache .hypothesis
	find vqr1 tests -name __pycache__ -type d -prune -exec rm -rf {} +
