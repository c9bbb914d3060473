# Every target sets up what it needs in .venv, so that a fresh clone needs nothing but Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all check bench validation residuals parity layouts communication memory-oracle golden examples \
	export-check clean

demo: $(READY)  ## the whole story on this machine, in minutes; results in out/demo
	$(BIN)/layoutwise demo -o out/demo

test: $(READY)  ## the suite, without what is marked slow
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(READY)  ## the suite with the slow tests
	$(BIN)/python -m pytest -m "slow or not slow"

check: $(READY)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## how fast the simulator is and the tool answers, and what the trainer adds to a step
	$(BIN)/python benchmarks/simulation.py
	$(BIN)/python benchmarks/answer_time.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/synchronisation.py
	$(BIN)/python benchmarks/step_overhead.py

validation: $(READY)  ## predict all published runs anew: docs/validation.md and its figure
	$(BIN)/layoutwise validate published -o docs

parity: $(READY)  ## train every layout of the parity cases, on up to 8 ranks: docs/parity.md, in about five minutes
	$(BIN)/python tests/runtime/parity_table.py

layouts: $(READY)  ## plan the jobs of well-known published runs: docs/published_layouts.md, in about five minutes
	$(BIN)/python tests/planner/published_layouts.py

communication: $(READY)  ## count what a rank of many layouts sends, beside the prediction: docs/communication.md, in about three minutes
	OMP_NUM_THREADS=1 $(BIN)/python tests/runtime/communication_table.py

residuals: $(READY)  ## fit how far peak memory and steps are off: simulator/data/*_residuals.toml, and how well it holds
	$(BIN)/python -m reports.memory_residuals
	$(BIN)/python -m reports.time_residuals_page

memory-oracle: $(READY)  ## count the memory of one rank of each of 60 layouts with fake tensors: docs/memory.md, in about ten minutes
	$(BIN)/python tests/runtime/memory_table.py

golden: $(READY)  ## write the golden files of export and launch anew, to be read before they are committed
	LAYOUTWISE_WRITE_GOLDEN=1 $(BIN)/python -m pytest tests/planner/test_export.py
	PYTHONPATH=tests $(BIN)/python tests/runtime/test_launchers.py

examples: $(READY)  ## plan every example anew: examples/README.md, in about three minutes
	PYTHONPATH=. $(BIN)/python tests/planner/examples_table.py

# The frameworks that export writes for, in a venv of their own, so that their pins and ours stay apart.
TARGETS := .venv-targets
export-check: $(READY) $(TARGETS)/.ready  ## load exported files with accelerate, transformers, DeepSpeed, torchtitan, megatron-core
	LAYOUTWISE_TARGETS_PYTHON=$(CURDIR)/$(TARGETS)/bin/python $(BIN)/python -m pytest -m slow -rs tests/planner/test_export.py

$(TARGETS)/.ready: Makefile
	$(PYTHON) -m venv $(TARGETS)
	$(TARGETS)/bin/pip install --quiet "torch>=2.11,<2.14" accelerate==1.15.0 transformers==5.23.0 megatron-core setuptools wheel
	$(TARGETS)/bin/pip install --quiet --no-build-isolation deepspeed==0.19.8
	$(TARGETS)/bin/pip install --quiet --no-deps torchtitan==0.3.0 tyro spmd_types torchdata docstring_parser typeguard shtab
	touch $@

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) $(TARGETS) out
