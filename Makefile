# Everything runs in .venv inside this checkout; `make setup` creates it and is a dependency of the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.byheart-setup

.PHONY: setup demo test check bench bench-peers clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# trains a small model with a kNN memory on embedded real text, evaluates it, prints table and plot
demo: setup
	$(BIN)/byheart train demo --out runs/demo --overwrite
	$(BIN)/byheart evaluate runs/demo --memory-size 0,2048,8192

# lint, types, floors
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

bench: setup
	$(BIN)/python -m benchmarks.search --quick
	$(BIN)/python -m benchmarks.step --quick
	$(BIN)/python -m benchmarks.attach --quick
	$(BIN)/python -m benchmarks.rmt --quick --rounds 1

# without its own dependencies: it asks for faiss-gpu, and runs on faiss-cpu
bench-peers: setup
	$(BIN)/python -m pip install --quiet --no-deps memorizing-transformers-pytorch==0.4.1 \
		recurrent-memory-transformer-pytorch==0.7.0 hyper-connections
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
