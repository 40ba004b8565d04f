# `make demo` draws pictures with the model inside the package; `make test` runs every test. Both need Python 3.10+ only.
PYTHON ?= python3
# Installed first and by its full version: pip then takes the build that fits this machine. Override for another one.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
CHECKED := $(wildcard src tests examples benchmarks utils setup.py)

.PHONY: demo test style quality clean

demo: $(VENV)/base.stamp
	HF_HUB_OFFLINE=1 $(BIN)/mar-hf generate --demo --num-images-per-class 1 --batch-size 35 --output demo.png

# Tests are small: a process of its own for each core does more than several threads for each test. Files keep the
# order of tests/conftest.py.
test: $(VENV)/test.stamp
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

style: $(VENV)/quality.stamp
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

quality: $(VENV)/quality.stamp
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/python utils/check_repo.py

clean:
	rm -rf $(VENV) build dist demo.png .pytest_cache .ruff_cache src/*.egg-info
	find $(CHECKED) -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of dependencies, so that every install happens once, and again when setup.py changes.
$(VENV)/base.stamp: setup.py
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "mar_hf needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/%.stamp: $(VENV)/base.stamp
	$(BIN)/pip install --quiet --editable ".[$*]"
	touch $@
