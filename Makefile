# make train · make test · make lint — each sets up .venv first, once.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
RUN := runs/demo

.PHONY: train test test-slow lint format clean

train: $(INSTALLED)
	$(BIN)/xlstm-lm train --config configs/train/demo.yaml --training.run_dir $(RUN)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "xlstm-lm needs Python 3.11 or newer, and $(PYTHON) is older: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# An oracle of the tests, without its dependencies: one is under a restrictive license, and the parts called need none.
	@# In a folder of its own: transformers takes a package xlstm on its path for a whole one, and then loads no xLSTM.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --upgrade \
	  --target .venv/oracles xlstm
	@touch $(INSTALLED)

clean:
	rm -rf .venv
