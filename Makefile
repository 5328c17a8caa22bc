# `make demo` and `make test` set everything up on a machine with Python 3.11 to 3.13, pip and make.

PYTHON ?= python3
VENV ?= .venv
# Another wheel index for torch, such as $(TORCH_WHEELS)/cpu; if not given, configs/torch_build.sh looks for the GPU.
TORCH_INDEX ?=
TORCH_WHEELS := https://download.pytorch.org/whl

BIN := $(VENV)/bin
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.PHONY: help gpu install demo test test-rest test-all lint benchmark train clean

help: ## Show what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

gpu: ## Say which build of torch suits this machine
	@build=$$(sh configs/torch_build.sh); echo "TORCH_INDEX=$${build:+$(TORCH_WHEELS)/$$build}"

$(VENV)/installed: pyproject.toml constraints.txt hatch_build.py tinysd_batch/model/packed/unpack.c tinysd_batch/model/packed/cpu_build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; name one with PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@index="$(TORCH_INDEX)"; \
	if [ -z "$$index" ]; then build=$$(sh configs/torch_build.sh); index="$${build:+$(TORCH_WHEELS)/$$build}"; fi; \
	echo "Installing torch: some 200 MB as a CPU build, 3 GB with CUDA. TORCH_INDEX=... names another wheel index."; \
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch $${index:+--index-url "$$index"}
	@echo "Installing tinysd-batch and what it needs: some 250 MB."
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/installed ## Make .venv with the program in it

demo: $(VENV)/installed ## Draw the twelve prompts of jobs/demo with the embedded model
	$(BIN)/tinysd-batch submit jobs/demo/job.toml --verbose

test: $(VENV)/installed-dev ## The default tests, in under 4 minutes on two cores
	$(BIN)/pytest $(PARALLEL)

test-rest: $(VENV)/installed-dev ## The slow tests; then, one at a time, those that start Ray, measure or kill processes
	HYPOTHESIS_PROFILE=thorough $(BIN)/pytest $(PARALLEL) -m '(slow or hypothesis) and not (chaos or alone)'
	$(BIN)/pytest -m 'chaos or alone'

test-all: test test-rest ## All tests that need no GPU, in under 40 minutes

lint: $(VENV)/installed-dev ## Style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

benchmark: $(VENV)/installed ## Measure the embedded model, the job layer beside Ray Data, and how much batches change images
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[benchmarks]'
	$(BIN)/python -m benchmarks.engine.quick
	$(BIN)/python -m benchmarks.job.overhead
	$(BIN)/python -m benchmarks.engine.batch_independence

train: $(VENV)/installed ## Make the embedded model anew (hours)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[training]'
	$(BIN)/python -m training.run

clean: ## Remove .venv and build products
	rm -rf $(VENV) build dist *.egg-info
