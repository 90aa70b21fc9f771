# kontextd: every job is a target here, and each sets .venv up first. A fresh machine needs Python >= 3.11 and make.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup edit serve test test-long test-kernels check bench test-gpu wheelhouse prove-offline

VENV := .venv
KERNELS := .venv-kernels
READY := $(VENV)/.ready
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# The first interpreter that is new enough and can make a virtual environment; 3.11 first: constraints.txt was tested on it.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& command -v $$python && break; done)
# Two busy cores and spinning OpenMP threads turn 0.1 s of work into 7 s, so whatever is tested runs on one thread.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest

IMAGE ?= $(firstword $(wildcard models/kontextd_models/embedded/samples/*.jpg))
PROMPT ?= make it black and white
RESULT ?= out/edited.png
DATA ?= out/data
PORT ?= 8000
WHEELHOUSE := dist/wheelhouse

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' Makefile

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "kontextd needs Python 3.11 or newer with venv and ensurepip;" \
		"on Debian: apt-get install python3 python3-venv. Or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	$(PIP) install --quiet --constraint constraints.txt hatchling editables
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

setup: $(READY) ## make .venv with every version pinned

edit: setup ## edit a bundled photo (IMAGE=..., PROMPT=..., RESULT=...)
	@test -f "$(IMAGE)" || { echo "there is no photo at '$(IMAGE)': make edit IMAGE=photo.jpg" >&2; exit 1; }
	@mkdir -p "$(dir $(RESULT))"
	$(VENV)/bin/kontextd edit "$(IMAGE)" "$(PROMPT)" -o "$(RESULT)"
	@echo "before: $(IMAGE)"
	@echo "after:  $(RESULT)"

serve: setup ## start the server with a first key (DATA=folder, PORT=8000, ARGS="--model DIR ...")
	$(VENV)/bin/kontextd serve --port $(PORT) --data "$(DATA)" --first-key "$(DATA)/first_key" $(ARGS)

test: setup ## run the tests that need no GPU
	$(PYTEST) -m "not gpu and not long" -n 2 --dist worksteal

test-long: setup ## run the long forms: races, fuzzing, a soak (about half an hour)
	$(PYTEST) -m long -n 2 --dist worksteal

# Triton is 1 GB and of no use without a GPU or these tests: an environment of its own, over the packages of .venv.
$(KERNELS)/.ready: $(READY)
	"$(VENV)/bin/python" -m venv --clear $(KERNELS)
	$(VENV)/bin/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> "$$($(KERNELS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/over.pth"
	$(KERNELS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --constraint constraints.txt triton
	touch $@

test-kernels: setup $(KERNELS)/.ready ## run the Triton kernels in the interpreter, and compile them (downloads Triton)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(KERNELS)/bin/python -m pytest -q -n 2 tests/kernels
	OMP_NUM_THREADS=1 $(KERNELS)/bin/python -m pytest -q tests/kernels/test_*_compiled.py

check: setup ## lint, formatting, strict types, Dockerfile, import direction, no pickle
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/hadolint Dockerfile.cuda
	$(PYTEST) -q tests/test_repository.py

bench: setup ## measure, into benchmarks/results/
	@missed=; for script in benchmarks/*.py kernels/bench.py; do echo "== $$script"; \
		$(VENV)/bin/python "$$script" || missed="$$missed $$script"; done; \
	test -z "$$missed" || { echo "these failed or missed a goal:$$missed" >&2; exit 1; }

test-gpu: setup ## run the tests that need a CUDA device
	@$(VENV)/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
		echo "torch sees no CUDA device here, so every one of these tests would be skipped" >&2; exit 1; }
	$(PYTEST) -m gpu

wheelhouse: setup ## collect all wheels for an off-line install in dist/wheelhouse/
	scripts/wheelhouse.sh $(VENV)/bin/python $(WHEELHOUSE)

prove-offline: wheelhouse ## install from the wheelhouse and edit a photo, without network, as a plain user
	scripts/prove_offline_install.sh $(WHEELHOUSE)
