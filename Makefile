# Two commands: `make demo` and `make test`. Both make .venv, install and print what they do.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
PYTEST = PYTHONSAFEPATH=1 LORA_REQUIRE_ORACLES=1 $(BIN)/python -m pytest

.PHONY: demo test test-all lint bench clean
.DEFAULT_GOAL := test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes in first and pinned: resolved later it could pull another build
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt torch triton
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(PIP) install --constraint constraints.txt --editable '.[plots]'
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.torch
	$(PIP) install --constraint constraints.txt --editable '.[plots,test,dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo ## install, then the whole path on the model that ships with the package
	$(BIN)/lora-core quickstart

test: $(VENV)/.test ## the test suite at quick counts (under 10 minutes on 2 cores)
	$(PYTEST) --numprocesses 2

test-all: $(VENV)/.test ## the same with full counts
	LORA_TEST_FULL=1 $(PYTEST) --numprocesses 2

lint: $(VENV)/.test ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test ## the benchmarks' smoke runs; figures want a quiet machine
	$(BIN)/python -m benchmarks.quantization --smoke
	$(BIN)/python -m benchmarks.cpu --smoke
	$(BIN)/python -m benchmarks.gpu --smoke

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
