# Everything runs in .venv, which the targets make by themselves from the locked
# requirements. Needs Python 3.11 or newer, and make.

SHELL := /bin/sh
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
DATA := .data
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$p"; break; }; done)
DISTRIBUTIONS := pyproject.toml clients/python/pyproject.toml
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# pip install of locked requirements, then of the two distributions themselves.
define install
	@test -n "$(PYTHON)" || { echo "exportd needs Python 3.11 or newer"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --require-hashes --requirement $(1)
	$(PIP) install --quiet --no-deps --no-build-isolation --editable clients/python --editable .
	@touch $@
endef

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' Makefile

$(VENV)/.runtime: requirements/runtime.txt $(DISTRIBUTIONS)
	$(call install,requirements/runtime.txt)

$(VENV)/.dev: requirements/dev.txt $(VENV)/.runtime
	$(call install,requirements/dev.txt)

demo: $(VENV)/.runtime ## Export, watch, download and verify the sample data
	$(BIN)/python tools/demo.py --data-dir $(DATA)

run: $(VENV)/.runtime ## Run a server on the sample data, in the foreground
	$(BIN)/python tools/run.py --data-dir $(DATA)

# Half of the tests' time is waiting: four processes are what two cores take.
JOBS ?= 4

# In the order of the directories: the unit tests, which are short, come last and fill up
# what the long ones leave.
test: $(VENV)/.dev ## Run the tests
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder \
		--ignore tests/clients $(ARGS)

clients: $(VENV)/.dev ## Build the clients of all languages, test them against a server
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/clients $(ARGS)

torture: $(VENV)/.dev ## Hurt a fleet for minutes, prove that it loses nothing
	$(BIN)/python -m tests.torture $(ARGS)

# How much of it: requests to a server, and inputs to each parser.
REQUESTS ?= 100000
RUNS ?= 100000

fuzz: $(VENV)/.fuzz ## Send a server and its parsers what nobody would, judge them
	$(BIN)/python -m tests.security.fuzz --requests $(REQUESTS) $(ARGS)
	$(BIN)/python -m tests.security.parsers --runs $(RUNS)

stalled: $(VENV)/.dev ## Measure what readers cost that take nothing, and judge it
	$(BIN)/python -m tests.security.stalled $(ARGS)

# Where it cannot be installed, Hypothesis makes the parsers' inputs.
$(VENV)/.fuzz: requirements/fuzz.txt $(VENV)/.dev
	$(PIP) install --quiet --require-hashes --requirement requirements/fuzz.txt \
		|| echo "atheris could not be installed; parsers are tried without it"
	@touch $@

# What is said of known weaknesses to the audit. Weaknesses that are found fail in any case.
# An index that answers no question about them, as a mirror may not, is known here by that
# name; with `make check ADVISORIES=` it has to answer.
ADVISORIES ?= --unanswered-ok

check: $(VENV)/.dev ## Format, lint, types, imports, contract, stubs, audit, licences
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python tests/typing
	$(BIN)/lint-imports --no-logo
	$(BIN)/buf lint proto
	$(BIN)/python -m tools.generate --check
	$(BIN)/python -m tools.release --check
	$(BIN)/python tools/configuration.py --check
	$(BIN)/python tools/api_reference.py --check
	$(BIN)/python tools/metrics.py --check
	$(BIN)/python -m bench.table --check
	$(BIN)/python tools/audit.py $(ADVISORIES)
	$(BIN)/python tools/licences.py --check

long: $(VENV)/.dev ## Run the tests that take minutes: hurt fleets, models, wheels
	MODEL_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest --numprocesses 2 \
		--dist loadfile -m minutes --ignore tests/clients $(ARGS)

# Of each model of the ledger.
EXAMPLES ?= 100

wheels: $(VENV)/.dev ## Install the wheels on the locked requirements alone, run the demo
	$(BIN)/python -m pytest -m minutes tests/integration/test_release.py $(ARGS)

release: $(VENV)/.dev ## Make release VERSION=x.y.z: versions, changelog, wheels in dist/
	$(BIN)/python -m tools.release "$(VERSION)"

format: $(VENV)/.dev ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gen: $(VENV)/.dev ## Generate the stubs, the API and the configuration page
	$(BIN)/python -m tools.generate
	$(BIN)/python tools/configuration.py
	$(BIN)/python tools/api_reference.py
	$(BIN)/python tools/metrics.py

BENCH ?= all

bench: $(VENV)/.bench ## Measure exportd beside its peers: BENCH="export download" (an hour)
	$(BIN)/python -m bench $(BENCH) $(ARGS)

# Peers that cannot be installed are left out of the benches, which say so.
$(VENV)/.bench: requirements/bench.txt $(VENV)/.dev
	$(PIP) install --quiet --require-hashes --requirement requirements/bench.txt \
		|| echo "the peers could not be installed"
	@touch $@

lock: $(VENV)/.dev ## Resolve the requirements anew
	$(BIN)/uv pip compile pyproject.toml --group build $(LOCK) \
		--output-file requirements/runtime.txt
	$(BIN)/uv pip compile pyproject.toml --extra tracing --group build --group dev $(LOCK) \
		--constraint requirements/runtime.txt --output-file requirements/dev.txt
	$(BIN)/uv pip compile --group fuzz $(LOCK) \
		--constraint requirements/dev.txt --output-file requirements/fuzz.txt
	$(BIN)/uv pip compile --group bench $(LOCK) \
		--constraint requirements/dev.txt --output-file requirements/bench.txt

LOCK := --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-package exportd --no-header

clean: ## Remove what the targets made, the virtual environment included
	rm -rf $(VENV) $(DATA) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis

.PHONY: help demo run test long torture fuzz stalled check format gen wheels release bench lock clean clients
