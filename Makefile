# make uptrain   train, export and report the demo recipe (no GPU, no download of data or weights)
# make test      the checks below, then the test suite
# make faults    kills at every point and at 50 random times, in one process and in two (a quarter of an hour)
# make exhaustive  every test that takes too long for each change, those of make faults among them
# make test-gpu  what only a GPU can show
# make fuzz      100,000 inputs made to break the parsers of rows, recipes, listings and shards (INPUTS=N for N)
# make check     lint, format, types, import layers
# make bench     speed and memory against the limit, small shapes on a CPU (15 minutes at most; docs/performance.md)
# make bench-gpu the same with the shapes of real models on a GPU
# make proof     accuracy against pruning rate, controlled: trains a base and its arms (an hour; docs/proof.md)
# make clean     remove .venv, caches and the demo's inputs; runs/ stays
#
# Each target makes .venv and installs into it when it is missing or older than pyproject.toml or constraints.txt.
# PYTHON names the interpreter that .venv is made with (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help uptrain bench bench-gpu proof test faults exhaustive test-gpu fuzz check clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(MAKEFILE_LIST)

uptrain: $(STAMP)
	$(BIN)/torchrun --standalone --nproc_per_node 1 launch/uptrain.py recipe=tiny

# Without a GPU, or the Trainer would take it.
bench: $(STAMP)
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m benchmarks.perf --size cpu

bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.perf --size gpu

proof: $(STAMP)
	$(BIN)/python -m benchmarks.proof --size $(or $(SIZE),default)

# One thread per worker: two workers with all cores each are slower than one. Without a GPU, so that runs in one process
# and in several, which the tests compare, compute on the same kind of device.
test: check
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

faults: $(STAMP)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest tests/faults/test_kills.py -m "exhaustive or not exhaustive"

exhaustive: $(STAMP)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m exhaustive

test-gpu: $(STAMP)
	$(BIN)/pytest tests/gpu

fuzz: $(STAMP)
	EVS_TRAIN_FUZZ=$(or $(INPUTS),100000) $(BIN)/pytest tests/faults/test_fuzz.py --timeout=7200 --durations=0

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find evs_train launch tests -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV). The first time this downloads several GB (torch brings the CUDA libraries) and takes minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "Installed: $$($(BIN)/python -c 'from importlib.metadata import version as v; print(*(f"{p} {v(p)}" for p in ("torch", "transformers", "deepspeed")), sep=", ")')"
	@touch $@
