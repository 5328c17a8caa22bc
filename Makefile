# `make demo` and `make test` set everything up on a machine with Python 3.11 to 3.13, pip and make.

PYTHON ?= python3
VENV ?= .venv
# Another wheel index for torch, such as $(TORCH_WHEELS)/cpu; by default configs/torch_build.sh detects the GPU.
TORCH_INDEX ?=
TORCH_WHEELS := https://download.pytorch.org/whl

BIN := $(VENV)/bin
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.PHONY: help gpu install demo test test-rest test-all lint docs screenshots benchmark release train clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

gpu: ## Show which build of torch suits this machine, and why
	@build=$$(sh configs/torch_build.sh); echo "TORCH_INDEX=$${build:+$(TORCH_WHEELS)/$$build}"

$(VENV)/installed: pyproject.toml constraints.txt hatch_build.py tinysd_batch/model/packed/unpack.c tinysd_batch/model/packed/cpu_build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; name one with PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@index="$(TORCH_INDEX)"; \
	if [ -z "$$index" ]; then build=$$(sh configs/torch_build.sh); index="$${build:+$(TORCH_WHEELS)/$$build}"; fi; \
	echo "Installing torch: about 200 MB for the CPU, 3 GB with CUDA. TORCH_INDEX=... chooses another wheel index."; \
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch $${index:+--index-url "$$index"}
	@echo "Installing tinysd-batch and its dependencies: about 250 MB."
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/installed ## Create .venv and install the program in it

demo: $(VENV)/installed ## Generate the images of jobs/demo with the embedded model
	$(BIN)/tinysd-batch submit jobs/demo/job.toml --verbose

test: $(VENV)/installed-dev ## Run the default tests (less than 4 minutes on two cores)
	$(BIN)/pytest $(PARALLEL)

test-rest: $(VENV)/installed-dev ## Run the slow tests; then, one at a time, those that start Ray, measure or kill processes
	HYPOTHESIS_PROFILE=thorough $(BIN)/pytest $(PARALLEL) -m '(slow or hypothesis) and not (chaos or alone)'
	$(BIN)/pytest -m 'chaos or alone'

test-all: test test-rest ## Run all tests that need no GPU (less than 40 minutes)

lint: $(VENV)/installed-dev ## Check style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/installed-dev ## Rewrite the tables of docs/ that are generated from the program
	$(BIN)/python -m docs.tables

screenshots: $(VENV)/installed ## Make the images of the README from a run of jobs/demo
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m docs.screenshots

release: $(VENV)/installed ## Build sdist and wheel into dist/ and check them in clean environments; upload nothing
	@$(BIN)/pip install --quiet --disable-pip-version-check build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	sh configs/check_release.sh $(BIN)/python

benchmark: $(VENV)/installed ## Run the short benchmarks: the embedded model, the job layer beside Ray Data, one seed in many batches
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[benchmarks]'
	$(BIN)/python -m benchmarks.engine.quick
	$(BIN)/python -m benchmarks.job.overhead
	$(BIN)/python -m benchmarks.engine.batch_independence

train: $(VENV)/installed ## Train the embedded model again (hours)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[training]'
	$(BIN)/python -m training.run

clean: ## Remove .venv and build products
	rm -rf $(VENV) build dist *.egg-info
