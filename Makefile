# `make demo` and `make test` need nothing but Python 3.11 or newer and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= -c configs/experiment/quickstart.yaml
RESULTS := notebooks/results
SLOW := -m 'not slow'
PARALLEL := -n logical --maxprocesses 4 --dist loadfile
# For one of several processes side by side: threads that wait do not spin, and memory that was freed is kept.
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647
# Python compiles what it imports, and most of what torch and wandb bring it never does.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable

.DEFAULT_GOAL := help
.PHONY: help install demo demo-small test test-all test-anywhere test-lowest lint format types imports pytest faults bench bench-check bench-gpu notebooks study docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "coin needs Python 3.11 or newer; set PYTHON=" && exit 1)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) '.[demo,dev]'
	$(BIN)/python -m compileall -q -q -j 0 $(VENV)/lib || true  # many tests start processes of their own
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(PIP) '.[docs]'
	@touch $@

install: $(VENV)/.dev  ## make the environment in .venv with everything for development

# Bytecode that the first start has made saves every later one some 15 seconds.
demo: $(VENV)/.demo  ## run the quickstart: two experts, one coded model, a table and a report; SEEDS=[0,1,2] for three seeds
	PYTHONDONTWRITEBYTECODE= $(BIN)/coin run $(DEMO) $(if $(SEEDS),--seeds=$(SEEDS))

demo-small: $(VENV)/.demo  ## the quickstart's smallest form: one seed, one epoch, a few steps
	$(BIN)/coin run -c configs/experiment/smallest.yaml

test: lint types imports pytest  ## lint, types, import contracts, and the tests that are quick

test-all: SLOW =
test-all: test  ## the same with the whole runs too: everything that must be green

lint: $(VENV)/.dev  ## check style and docstrings
	$(BIN)/ruff check coin tests notebooks
	$(BIN)/ruff format --check coin tests notebooks

format: $(VENV)/.dev  ## format the code and mend what can be mended
	$(BIN)/ruff check --fix coin tests notebooks
	$(BIN)/ruff format coin tests notebooks

types: $(VENV)/.dev  ## check the types (mypy, strict)
	$(BIN)/mypy

imports: $(VENV)/.dev  ## check that imports flow one way
	$(BIN)/lint-imports

pytest: $(VENV)/.dev  ## run the tests that are quick, and list the 20 slowest
	$(ONE_THREAD) $(BIN)/pytest $(PARALLEL) --durations=20 $(SLOW)

# HOME is /sys, where nobody can make a file, not even root, whom a folder's mode does not bind; Ray keeps a token in HOME unless
# it is given one. PYTHONPATH comes before the environment's editable installation: all processes import the copy's coin.
ELSEWHERE := LANG=C LC_ALL=C HOME=/sys RAY_AUTH_TOKEN=$(shell printf '%064d' 1)
test-anywhere: $(VENV)/.dev  ## the last commit's quick tests as elsewhere: older processors, other orders, a read-only HOME, a path with a space
	set -e; place=$$(mktemp -d); trap 'rm -rf "$$place"' EXIT; copy="$$place/a folder/coin"; seed=0; \
	git clone --quiet . "$$copy"; cd "$$copy"; \
	for processor in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 '-u ATEN_CPU_CAPABILITY'; do \
		seed=$$((seed + 1)); echo "seed $$seed, $$processor"; \
		env -u ONEDNN_MAX_CPU_ISA $$processor $(ELSEWHERE) $(ONE_THREAD) PYTHONPATH="$$copy" \
			'$(CURDIR)/$(BIN)/pytest' $(PARALLEL) --randomly-seed=$$seed $(SLOW) $(TESTS); \
	done

# With Python 3.11: not every lowest version has wheels for newer ones.
test-lowest:  ## the quick tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest --resolution lowest-direct --editable '.[demo,dev]'
	@touch .venv-lowest/.demo .venv-lowest/.dev
	$(MAKE) pytest VENV=.venv-lowest

faults: $(VENV)/.dev  ## make the faults of tests/faults.yaml one at a time, and print those that no test catches; ROOMS=coding
	PYTEST_ADDOPTS="$(PARALLEL)" $(ONE_THREAD) $(BIN)/python tests/faults.py $(ROOMS)

bench: $(VENV)/.demo  ## time the exact Fisher against its limit and the simple ways
	$(BIN)/python -W ignore notebooks/benchmarks/fisher.py

bench-check: $(VENV)/.demo  ## fail if the exact Fisher has become slow, as a ratio to its limit
	$(BIN)/python -W ignore notebooks/benchmarks/fisher.py --check --repeats 3 --networks resnet18 mobilenet_v2

bench-gpu: $(VENV)/.demo  ## time Fisher, Refit, decoders and a training step on the GPU, or in small without one
	$(BIN)/python -W ignore notebooks/benchmarks/gpu.py

notebooks: $(VENV)/.dev  ## run the notebooks from top to bottom
	$(BIN)/pytest tests/pipeline/test_notebooks.py

# The study's suites: what `coin run` is given, a line each. Those of photos and intents need files that you make: notebooks/BENCHMARK.md.
define SUITES
-c quickstart
-c fleet-32
-c fleet-8
-c fleet-2
-c fleet-32 -c frontier --name=frontier-32
-c fleet-8 -c frontier --name=frontier-8 --seeds=[402]
-c fleet-2 -c frontier --name=frontier-2 --seeds=[402]
-c imagenet-pair -c stand-ins
-c vit-small -c stand-ins --name=vit-1 --seeds=[401] --base.seed=1
-c vit-small -c stand-ins --name=vit-2 --seeds=[402] --base.seed=2
-c vit-small -c stand-ins --name=vit-3 --seeds=[403] --base.seed=3
endef
SUITES_OF_INTENTS := -c intents
define SUITES_OF_PHOTOS
-c photos
-c photos -c frontier --name=frontier-photos --seeds=[7]
-c resnet50
endef
# What is measured on the suites' experts: a script of notebooks, and what it is given.
MEASURED_ON_INTENTS := lora.py $(RESULTS)/intents/seed-401 --output $(RESULTS)/lora/lora.csv
define MEASURED_ON_PHOTOS
rivals.py $(RESULTS)/photos/seed-401 --output $(RESULTS)/photos/rivals.csv
layers.py $(RESULTS)/photos/seed-401 --output $(RESULTS)/photos/layers.csv
silent_faults.py $(RESULTS)/photos/seed-* --output $(RESULTS)/silent-faults/faults.csv
endef
export SUITES SUITES_OF_PHOTOS MEASURED_ON_PHOTOS
PHOTOS := $(wildcard data/photos)
INTENTS := $(wildcard data/intents)

# Two at a time. A run goes on where it was killed; experts and bases that suites share are made once.
study: $(VENV)/.demo  ## the results in notebooks/results anew, and the tables of README and docs: some four hours
	$(PIP) '.[demo,timm,text]'
	printf '%s\n' "$$SUITES" $(if $(INTENTS),"$(SUITES_OF_INTENTS)") $(if $(PHOTOS),"$$SUITES_OF_PHOTOS") | OMP_NUM_THREADS=1 xargs -P 2 -I% sh -c '$(BIN)/coin run % --output=$(RESULTS) || exit 255'
	printf '%s\n' $(if $(INTENTS),"$(MEASURED_ON_INTENTS)") $(if $(PHOTOS),"$$MEASURED_ON_PHOTOS") | $(ONE_THREAD) xargs -r -P 2 -I% sh -c '$(BIN)/python notebooks/% || exit 255'
	$(BIN)/python notebooks/tables.py

docs: $(VENV)/.docs  ## build the documentation in dist/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file .mkdocs.yml
	@echo "open dist/site/index.html; for its search: $(BIN)/python -m http.server --directory dist/site"

clean:  ## remove the environment and all caches; results in runs/ stay
	rm -rf $(VENV) .venv-lowest .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage dist
	find coin tests -name __pycache__ -type d -prune -exec rm -rf {} +
