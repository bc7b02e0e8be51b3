PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup
setup: $(VENV)/.ready

$(VENV)/.ready: requirements/cpu.txt requirements/dev.txt requirements/build.txt setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements/build.txt
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -r requirements/dev.txt
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@
