# `make demo` and `make test` set up everything themselves: a virtual environment in .venv, nothing outside the folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint install clean
.DEFAULT_GOAL := demo

install: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing (about 2.5 GB, some minutes) ..."
	$(BIN)/python -m pip install --progress-bar off torch==2.13.0
	$(BIN)/python -m pip install --progress-bar off -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --progress-bar off --no-deps --no-build-isolation -e .
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python tools/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf runs .cache
