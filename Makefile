# Two commands that set up all they need in .venv, and reuse it: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# SAEBench needs older versions of numpy and datasets.
SAEBENCH := .venv-saebench
# Two threads that fight for a core are slower than one: the tests are many small computations.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: quickstart test test-saebench compatibility lint types format clean

quickstart: $(VENV)/installed
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/itda-lens quickstart

test: lint types
	$(TEST_ENV) $(BIN)/python -m pytest
	$(TEST_ENV) $(BIN)/python -m pytest --override-ini addopts= --nbmake --nbmake-timeout=600 tutorials

test-saebench: $(SAEBENCH)/installed
	$(TEST_ENV) $(SAEBENCH)/bin/python -m pytest tests/test_saebench.py

compatibility: $(VENV)/installed $(SAEBENCH)/installed
	rm -f docs/compatibility.md
	$(TEST_ENV) $(BIN)/python -m pytest tests --compatibility docs/compatibility.md
	$(TEST_ENV) $(SAEBENCH)/bin/python -m pytest tests/test_saebench.py --compatibility docs/compatibility.md

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/pyright

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# SAEBench asks for torchvision but does not use it; the one that is installed may belong to another build of torch.
$(SAEBENCH)/installed: pyproject.toml constraints-saebench.txt
	$(PYTHON) -m venv $(SAEBENCH)
	$(SAEBENCH)/bin/python -m pip install --quiet --upgrade pip
	$(SAEBENCH)/bin/python -m pip install --quiet --constraint constraints-saebench.txt torch
	$(SAEBENCH)/bin/python -m pip install --quiet --constraint constraints-saebench.txt --editable ".[saebench]" pytest hypothesis
	$(SAEBENCH)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf $(VENV) $(SAEBENCH) .pytest_cache .ruff_cache .hypothesis itda-quickstart
