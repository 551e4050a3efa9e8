# Needs make and Python >= 3.11 (with its venv module), nothing else.
#
#   make demo     trains a small network on real images, and draws its curves
#   make test     checks everything: style, types, floors, tests
#   make help     lists the rest
#
# PYTHON=python3.13 chooses the interpreter, VENV=path where the packages go.

VENV ?= .venv
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := $(VENV)/bin
# Most files of most packages are never imported: Python compiles the others at their first import, and keeps that unless
# it is told not to.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
export PYTHONDONTWRITEBYTECODE :=
JOBS ?= 2
KILLS ?= 100
STEERED_KILLS ?= 60
RANK_KILLS ?= 25

.DEFAULT_GOAL := help
.PHONY: help setup demo test coverage test-bare lint bench chaos docs pictures

help: ## lists what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s  %s\n", $$1, $$2}' Makefile

# --- what gets installed: each once, and again when the versions change ---------------------------------------------

$(VENV)/.torch: constraints.txt
	@test -n '$(PYTHON)' || { echo 'Found no Python >= 3.11 with its venv module. Install one (Debian: apt install python3-venv), or say PYTHON=path.'; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing torch into $(VENV): some minutes, once'
	@$(INSTALL) pip==26.3  # finds and unpacks the packages in half the time of the one that Python 3.11 brings
	@$(INSTALL) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo 'Installing Aetheria'
	@$(INSTALL) -e '.[examples]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	@echo 'Installing Aetheria with its optional and its development packages'
	@$(INSTALL) -e '.[dev,tensorboard,wandb,mlflow,trackio,onnx,mcp,remote,lightning,transformers]'
	@touch $@

setup: $(VENV)/.test ## a virtual environment with everything that developing needs
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true  # some packages carry files of other versions

# --- what can be run ------------------------------------------------------------------------------------------------

demo: $(VENV)/.demo ## trains a network that reads handwritten digits, and draws its curves
	@$(BIN)/aetheria train examples/digits/config.yaml
	@$(BIN)/aetheria plot @last -o curves.png
	@echo
	@echo 'The curves are in curves.png. To type aetheria without a path:  . $(BIN)/activate'

test: lint ## style, types, floors, and every test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

coverage: $(VENV)/.test ## every test, and which lines none of them has run; a third slower
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cov

test-bare: ## the tests without any optional package, in a virtual environment of its own
	@$(MAKE) --no-print-directory VENV=$(VENV)-bare $(VENV)-bare/.bare
	$(VENV)-bare/bin/python -m pytest -n $(JOBS) --dist worksteal

$(VENV)/.bare: $(VENV)/.torch pyproject.toml
	@$(INSTALL) -e '.[test]'
	@touch $@

lint: $(VENV)/.test ## style, types and floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

chaos: $(VENV)/.test ## kills runs at random instants; KILLS=1000 for a longer look
	AETHERIA_CHAOS_KILLS=$(KILLS) AETHERIA_CHAOS_STEERED_KILLS=$(STEERED_KILLS) \
	AETHERIA_CHAOS_RANK_KILLS=$(RANK_KILLS) AETHERIA_RANKED_STEPS=3000 AETHERIA_RANKED_PAUSE=20 \
	AETHERIA_RANKED_TIMEOUT=5 $(BIN)/python -m pytest tests/chaos tests/integration/test_ranks_steering.py -s

bench: ## measures the engine beside others, in a virtual environment of its own: benchmarks/results
	@$(MAKE) --no-print-directory VENV=$(VENV)-bench $(VENV)-bench/.bench
	@for script in $$(grep -l '^def main' benchmarks/*.py); do \
		echo "$$script"; $(VENV)-bench/bin/python -m benchmarks.$$(basename $$script .py) || test $$? -eq 2 || exit 1; \
	done

$(VENV)/.bench: $(VENV)/.torch pyproject.toml benchmarks/requirements.txt
	@$(INSTALL) -e . -r benchmarks/requirements.txt
	@touch $@

docs: $(VENV)/.test ## writes the generated references anew, and checks every link
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_protocol.py
	$(BIN)/python -m pytest tests/unit/test_documents.py tests/integration/test_readme.py

pictures: $(VENV)/.test ## trains the digits and takes the README's pictures anew
	$(BIN)/python docs/make_pictures.py
