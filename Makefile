# make demo, make test: each sets up everything it needs in .venv and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help venv demo test test-fast lint format coverage docs docs-check bench gpu clean

help:
	@echo "make venv   install everything into .venv"
	@echo "make demo   render clips, train, evaluate, write the HTML report"
	@echo "make test   lint, types and the test suite"
	@echo "make bench  kernel benchmarks of this machine"
	@echo "make clean  remove .venv and what runs left behind"
	@echo
	@echo "make format      ruff's formatter and its safe fixes"
	@echo "make lint        ruff and mypy"
	@echo "make test-fast   the tests without kernels, launchers and long training runs"
	@echo "make coverage    the suite, and which lines of both packages it runs"
	@echo "make docs        write the generated tables of the documentation"
	@echo "make docs-check  fail where a generated table or an example is stale"
	@echo "make gpu         the checks and benchmarks that need a GPU"

venv: $(STAMP)

$(STAMP): setup.py constraints.txt
	@echo "Installing into $(VENV): some minutes the first time, and 10 GB of free disk."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check \
	    -c constraints.txt -e '.[test,monitor,torchcodec]'
	@touch $@

demo: $(STAMP)
	$(BIN)/kineticlip demo --out demo-output

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile \
	    --ignore tests/kernels --ignore tests/bench --ignore tests/runtime/test_launcher.py \
	    --ignore tests/training/test_resume.py --ignore tests/training/test_engine.py \
	    --ignore tests/commands/test_demo.py

coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile \
	    --cov=kineticlip --cov=kineticlip_kernels --cov-report=term:skip-covered

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python docs/build.py

docs-check: $(STAMP)
	$(BIN)/python docs/build.py --check
	$(BIN)/python -m pytest tests/docs tests/test_front_door.py tests/kernels/test_kernel_names.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini

bench: $(STAMP)
	$(BIN)/kineticlip bench

gpu: $(STAMP)
	PYTHON=$(BIN)/python bash bench/gpu.sh

clean:
	rm -rf $(VENV) demo-output runs .pytest_cache .mypy_cache .ruff_cache .coverage
