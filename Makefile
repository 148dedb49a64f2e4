# make demo, make test: each sets up everything it needs in .venv and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help venv demo test lint bench clean

help:
	@echo "make venv   install everything into .venv"
	@echo "make demo   render clips, train, evaluate, write the HTML report"
	@echo "make test   lint, types and the test suite"
	@echo "make bench  kernel benchmarks of this machine"
	@echo "make clean  remove .venv and what runs left behind"

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

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/kineticlip bench

clean:
	rm -rf $(VENV) demo-output runs .pytest_cache .mypy_cache .ruff_cache
