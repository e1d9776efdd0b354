# Two commands: `make demo` and `make test`. Both make .venv and install into it first.
# TORCH says which torch is installed first, if not that of constraints.txt: `make test TORCH=torch==2.14.1`.
# Waiting threads must not spin: where other processes share the cores, spinning makes torch crawl.
export OMP_WAIT_POLICY = passive

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
TORCH ?= $(shell grep '^torch==' constraints.txt)
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/orbitdit/__init__.py)
# Tests run in a process a core, up to four: each takes up to 3 GB, and on a machine with a GPU a part of its memory.
# One that runs out of tests takes over some of another's. WORKERS= runs them all in one process.
WORKERS ?= --numprocesses=logical --maxprocesses=4 --dist=worksteal
CONSTRAINTS := .venv/constraints.txt
# Named after what was installed, so that another torch or another version of orbitdit is installed anew.
INSTALLED := .venv/.installed-$(VERSION)-$(subst =,,$(TORCH))

.PHONY: demo test coverage faults wheel lint format clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	rm -f .venv/.installed*
	{ grep -v '^torch==' constraints.txt; echo '$(TORCH)'; } > $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)' --constraint $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --editable '.[diffusers,test,lint]' --constraint $(CONSTRAINTS)
	touch $@

demo: $(INSTALLED)
	rm -rf $(DEMO)
	$(BIN)/orbitdit compare --bits w4a4 --bits w2a4 --out $(DEMO)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(WORKERS)

coverage: $(INSTALLED)
	$(BIN)/python -m pytest $(WORKERS) --cov --cov-report=term

# Half an hour. Writes docs/reliability.md and the lines that it is made of.
faults: $(INSTALLED)
	rm -f docs/reliability.jsonl
	$(BIN)/python -m scripts.faults --out docs/reliability.jsonl
	$(BIN)/python -m scripts.faults_writing --out docs/reliability.jsonl
	$(BIN)/python -m scripts.loading --out docs/reliability.jsonl
	$(BIN)/python -m scripts.faults_page

wheel: $(INSTALLED)
	$(BIN)/python -m scripts.check_wheel

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .coverage demo build dist
