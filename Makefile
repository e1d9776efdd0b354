# Two commands: `make demo` and `make test`. Both make .venv and install into it first.
# Waiting threads must not spin: where other processes share the cores, spinning makes torch crawl.
export OMP_WAIT_POLICY = passive

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test lint format clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --editable '.[diffusers,test,lint]' --constraint constraints.txt
	touch $@

demo: .venv/.installed
	rm -rf $(DEMO)
	$(BIN)/orbitdit compare --bits w4a4 --bits w2a4 --out $(DEMO)

test: .venv/.installed
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv demo build dist
