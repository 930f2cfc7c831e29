# Two commands matter: `make demo` and `make test`. Both work on a machine with only Python 3.11.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := .avzero/demo

.PHONY: demo test test-infra test-hosts lint unit bench stack stack-stop stack-status clean

# Made once; made again when the pins or the project file change.
$(VENV)/ready: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "avzero needs Python 3.11 or newer, found %d.%d" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

# What the tiers against real servers and hosts need besides.
$(VENV)/infra: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,server,infra]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/avzero simulate $(DEMO)/DEMO --size small
	$(BIN)/avzero ingest avca $(DEMO)/DEMO --features main --split main
	$(BIN)/avzero sweep jobs/demo.yaml
	$(BIN)/avzero test jobs/demo.yaml
	@echo
	@echo 'Compare the runs in MLflow:  $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db'

lint: $(VENV)/ready
	$(BIN)/ruff check platform tests
	$(BIN)/ruff format --check platform tests
	$(BIN)/mypy

unit: $(VENV)/ready
	$(BIN)/pytest -n 2 --no-loadscope-reorder -m "not infra and not faults and not hosts"

# Three hosts made from network namespaces (root): a worker cut off, the head killed, and more.
test-hosts: $(VENV)/infra
	$(BIN)/pytest -s -m hosts tests/hosts

test: lint unit

# Against real servers: Ceph's S3 gateway, PostgreSQL, MLflow; what is missing is skipped and said.
# And sweeps whose processes are killed.
test-infra: $(VENV)/infra
	$(BIN)/pytest -m "infra or faults"

# PostgreSQL, an S3 server and MLflow on loopback, to develop against; their data is in .avzero/stack.
stack: $(VENV)/ready
	@$(BIN)/python -m tests.infra.stack start

stack-stop stack-status: stack-%: $(VENV)/ready
	@$(BIN)/python -m tests.infra.stack $*

# One benchmark: make bench B=store_reading
bench: $(VENV)/ready
	$(BIN)/python -m tests.bench.$(B)

clean:
	rm -rf $(VENV) .avzero mlflow.db mlruns
