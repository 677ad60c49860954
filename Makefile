# Setup and checks of PEFT Lab. `make help` lists the targets.
#
#   make setup                      uv from the lock; pip on the same lock where uv cannot be had
#   make setup TORCH_BACKEND=cpu    torch from that backend of uv's (cpu, cu128, ...) instead of the registry's build
#   make setup INSTALLER=pip PYTHON=/path/to/python3.12
#
# Works with the make 3.81 of macOS: no .ONESHELL.

SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/.stamp

# The torch of the lock, and the sha256 of its CPU wheel for Linux x86-64 and Python 3.11. A folder of pip's find-links
# may offer that wheel; the registry that the lock is resolved on does not, so `make lock` adds the hash.
TORCH := torch==2.13.0
TORCH_CPU_SHA256 := 6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
UV_VERSION := 0.13.9

INSTALLER ?= uv
TORCH_BACKEND ?=
PYTHON ?=

# uv does not read pip's settings: hand over where pip looks for wheels (pip separates by spaces, uv by commas).
empty :=
comma := ,
UV_FIND_LINKS ?= $(subst $(empty) $(empty),$(comma),$(strip $(PIP_FIND_LINKS)))
export UV_FIND_LINKS
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# uv compiles nothing, and some images tell Python to keep nothing compiled: each start would then take three times as long.
export PYTHONDONTWRITEBYTECODE :=

# Errors alone are printed.
UV_INSTALL := $(BIN)/uv pip install -q --python $(BIN)/python
PIP_INSTALL := $(BIN)/python -m pip install -qq

.PHONY: help setup demo demo-full test lint types docs bench lock clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1\t\2/p' Makefile | expand -t 18

setup: $(STAMP)  ## the environment in .venv, from requirements.lock
	@echo "make setup: .venv is ready; next: source .venv/bin/activate && peftlab --help, or make demo: the lab in minutes"

demo: $(STAMP)  ## the whole lab on a tiny model: classify, SFT, reward model, PPO, judge, report
	@$(BIN)/peftlab demo

demo-full: $(STAMP)  ## the same, then explanations and summaries
	@$(BIN)/peftlab demo --full

test: $(STAMP)  ## the tests, a process for each core up to four
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)  ## ruff
	@$(BIN)/ruff check

types: $(STAMP)  ## mypy, strict in ops, rl and sampling
	@$(BIN)/mypy

docs: $(STAMP)  ## the site of docs/, into build/docs; a warning is an error
	@$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs
	@echo "open build/docs/index.html"

bench: $(STAMP)  ## speed and memory, one JSON line a row (PEER=--peer: beside TRL and generate)
	@set -eu; for program in decode ppo_step memory; do \
	echo "$$program" >&2; $(BIN)/python benchmarks/$$program.py $(PEER); done; \
	for program in train_step data_check serve; do echo "$$program" >&2; $(BIN)/python benchmarks/$$program.py; done

clean:  ## removes .venv, caches and runs/
	rm -rf .venv runs build dist src/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last, so a setup that was interrupted starts again. How torch gets here without CUDA's gigabytes is
# told in CONTRIBUTING.md under 'torch'. No step resolves anything (--no-deps): the locks name every package.
$(STAMP): requirements.lock requirements-cuda.lock pyproject.toml Makefile
	@set -eu; \
	if ! $(BIN)/python -c 'import pip, sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then \
	  for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11) ''; do \
	    [ -n "$$python" ] || { echo "make setup: needs Python 3.11, 3.12 or 3.13 and found none;" \
	      "install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	    "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && break; \
	  done; \
	  echo "make setup: .venv with $$("$$python" --version)"; \
	  "$$python" -m venv --clear .venv; \
	fi
	@set -eu; trap 'exit 130' INT TERM; \
	echo "make setup: installs requirements.lock; what is not in a cache is downloaded: about 300 MB," \
	  "and torch, 190 MB for a CPU or 530 MB for CUDA"; \
	if [ -z "$$UV_FIND_LINKS" ]; then \
	  UV_FIND_LINKS=$$($(BIN)/python -m pip config get global.find-links 2>/dev/null | xargs | tr ' ' ',') || true; \
	fi; \
	if [ "$(INSTALLER)" = uv ] && $(PIP_INSTALL) uv==$(UV_VERSION); then \
	  if [ -n "$(TORCH_BACKEND)" ]; then UV_TORCH_BACKEND=$(TORCH_BACKEND) $(UV_INSTALL) $(TORCH); fi; \
	  install="$(UV_INSTALL)"; \
	elif [ -n "$(TORCH_BACKEND)" ]; then \
	  echo "make setup: TORCH_BACKEND needs uv; without it, put a CPU wheel of $(TORCH) in pip's find-links" >&2; exit 1; \
	else \
	  echo "make setup: without uv; pip takes a few minutes"; \
	  awk '/^[a-z]/ { on = /^torch==/; sub(/^torch==[^ ]*/, "&+cpu") } on' requirements.lock >.venv/torch-cpu.txt; \
	  $(PIP_INSTALL) --no-deps -r .venv/torch-cpu.txt || \
	    echo "make setup: no CPU wheel of torch in pip's find-links; taking the registry's build"; \
	  install="$(PIP_INSTALL)"; \
	fi; \
	$$install --no-deps -r requirements.lock; \
	if [ -z "$(TORCH_BACKEND)" ] && $(BIN)/python -c "$$WANTS_CUDA"; then \
	  echo "make setup: this torch is for CUDA; installs requirements-cuda.lock, several GB"; \
	  $$install --no-deps -r requirements-cuda.lock; \
	fi; \
	$$install --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import datasets, peft; from transformers import Trainer'
	@touch $@

# Does the torch that got installed name CUDA's packages among its own requirements?
define WANTS_CUDA
import importlib.metadata as m, sys
sys.exit(not any(r.startswith(("cuda-", "nvidia-")) for r in m.requires("torch") or ()))
endef
export WANTS_CUDA

# One resolution, split in two: what every machine installs, and what only a CUDA build of torch needs beside it.
# Keeps the present pins where they still fit; UPGRADE=1 takes the newest. Find-links stay out, so that anyone gets the same lock.
lock: $(STAMP)  ## requirements.lock and requirements-cuda.lock from pyproject.toml (UPGRADE=1: newest versions)
	@set -eu; \
	cat requirements.lock requirements-cuda.lock >.venv/full.lock; echo '$(TORCH)' >.venv/pin.txt; \
	env -u UV_FIND_LINKS $(BIN)/uv pip compile -q pyproject.toml --extra dev --constraints .venv/pin.txt --universal \
	  --fork-strategy fewest --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-emit-find-links \
	  $(if $(UPGRADE),--upgrade) --upgrade-package torch -o .venv/full.lock >/dev/null; \
	awk -v cpu=$(TORCH_CPU_SHA256) ' \
	  BEGIN { main = ".venv/requirements.lock"; cuda = ".venv/requirements-cuda.lock"; \
	    print "# `make lock` writes this file: Linux and macOS, Python 3.11 to 3.13, tools for the tests included." > main; \
	    print "# `make lock` writes this file: what a CUDA build of torch needs on Linux, beside requirements.lock." > cuda } \
	  /^[a-z]/ { out = /^(cuda-|nvidia-|triton=)/ ? cuda : main } \
	  /^ *# *-c / { next } \
	  { print > out } \
	  /^torch==/ { print "    --hash=sha256:" cpu " \\" > out }' .venv/full.lock; \
	mv .venv/requirements.lock .venv/requirements-cuda.lock .
