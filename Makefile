# make demo   the whole job on two CPU cores, offline after installation
# make test   lint, all tests
# make lint   style and types
# make test-fast   the tests that take no time, for the daily loop
# make bench   speed beside the plain paths, transformers and bare library calls (docs/performance.md)
# make test-slurm   jobs that a SLURM cluster of its own preempts and requeues; root, slurm-wlm and munge
PYTHON ?= python3
# An active environment with torch and torchaudio of the pinned version is used as it is, CPU builds (+cpu) too.
FITTING := import sys, importlib.metadata as m; found = {m.version(name) for name in ("torch", "torchaudio")}; \
	fits = {x.partition("+")[0] for x in found} == {sys.argv[1]} and len(found) == 1 and sys.prefix != sys.base_prefix; \
	print(sys.prefix) if fits else sys.exit(1)
VENV ?= $(shell $(PYTHON) -c '$(FITTING)' $(shell sed -n 's/^torch==//p' requirements.txt) 2>/dev/null || echo .venv)
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-slurm bench lint clean

demo: $(VENV)/installed $(VENV)/installed-demo
	PYTHON=$(BIN)/python bash demo/run.sh

test test-fast: $(VENV)/installed $(addprefix $(VENV)/installed-,demo dev export s3prl) lint
	$(BIN)/python -m pytest -q -n auto --dist worksteal $(if $(filter test-fast,$@),-m 'not slow')

test-slurm: $(VENV)/installed $(VENV)/installed-demo $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -rs tests/slurm

bench: $(VENV)/installed $(VENV)/installed-demo $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.bench_model --out results/bench_update.csv --sections update
	$(BIN)/python -m benchmarks.bench_model --out results/bench_inference.csv --sections inference
	$(BIN)/python -m benchmarks.bench_data --out results/bench_data.csv

lint: $(VENV)/installed $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv demo/out

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; call make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(BIN)/python
	@echo "installing requirements.txt; PyTorch's CUDA build, which torchaudio's wheel needs, is 5 GB on Linux"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/installed-%: requirements-%.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
