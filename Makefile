# Everything runs in .venv inside this checkout; `make setup` creates it and is a dependency of the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.byheart-setup
# 18,000 files are compiled by all cores afterwards, which pip does with one in over a minute
QUICKLY := --quiet --no-compile

# pairs of torch and transformers that must work: the oldest that pyproject.toml allows, and newer ones
MATRIX ?= 2.11.0,5.17.0 2.13.0,5.17.0 2.13.0,5.23.0

.PHONY: setup demo test test-gpu test-matrix check bench bench-peers clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(QUICKLY) -c constraints.txt torch
	$(BIN)/python -m pip install $(QUICKLY) -c constraints.txt -e '.[dev]'
	@# some packages have files that are no Python; most tests and models of theirs are never imported
	$(BIN)/python -m compileall -q -j 0 -x '/tests/|/transformers/models/' $(VENV)/lib \
		>/dev/null 2>&1 || true
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

test-gpu: setup
	$(BIN)/python -m pytest -m gpu tests

# all tests, with each pair in an environment of its own
test-matrix:
	for pair in $(MATRIX); do \
		torch=$${pair%,*} transformers=$${pair#*,} venv=$(VENV)-matrix/$$pair; \
		$(PYTHON) -m venv $$venv && \
		$$venv/bin/python -m pip install --quiet torch==$$torch transformers==$$transformers -e '.[dev]' && \
		echo "torch $$torch, transformers $$transformers" && \
		OMP_NUM_THREADS=1 $$venv/bin/python -m pytest -n 2 --dist worksteal || exit 1; \
	done

bench: setup
	$(BIN)/python -m benchmarks.search --quick
	$(BIN)/python -m benchmarks.crossover --quick
	$(BIN)/python -m benchmarks.step --quick
	$(BIN)/python -m benchmarks.attach --quick
	$(BIN)/python -m benchmarks.rmt --quick --rounds 1
	$(BIN)/python -m benchmarks.decode --quick
	$(BIN)/python -m benchmarks.read --quick

# without its own dependencies: it asks for faiss-gpu, and runs on faiss-cpu
bench-peers: setup
	$(BIN)/python -m pip install --quiet --no-deps memorizing-transformers-pytorch==0.4.1 \
		recurrent-memory-transformer-pytorch==0.7.0 hyper-connections
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'

clean:
	rm -rf $(VENV) $(VENV)-matrix .pytest_cache .mypy_cache .ruff_cache
