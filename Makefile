# Everything a person types. `make` alone lists it.
# Needs Python 3.10 or newer as python3 (or PYTHON=...); no GPU and no running service.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The environment is made again when what it is made of changes.
STAMP = $(VENV)/.installed-$(shell cat requirements.txt $(wildcard requirements.lock) | (sha256sum 2>/dev/null || shasum -a 256) | cut -c1-12)
DEV_STAMP = $(VENV)/.dev-$(shell cat requirements.txt requirements-dev.txt | (sha256sum 2>/dev/null || shasum -a 256) | cut -c1-12)
PORT ?= 5000
KILLS ?= 30
SEED ?= 0

.DEFAULT_GOAL := help
.PHONY: help run test test-slow lint ui soak lock install install-dev clean

help:  ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

install: $(STAMP)  ## Make .venv and install what ftlib stands on
install-dev: $(DEV_STAMP)

# The lock names the exact files (with their hashes) of one platform and Python; elsewhere the pinned versions are installed without it.
$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-*
	if test -f requirements.lock && $(BIN)/python -m pip install --disable-pip-version-check --quiet --require-hashes --only-binary :all: --no-binary grad-cam -r requirements.lock 2>$(VENV)/lock.log; then \
	  echo "installed from requirements.lock, every file checked against its hash"; \
	else \
	  test -f requirements.lock && echo "requirements.lock does not fit this platform or Python ($$(tail -n 1 $(VENV)/lock.log | cut -c1-120)); installing requirements.txt without hashes"; \
	  $(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt; \
	fi
	touch $@

$(DEV_STAMP): $(STAMP)
	rm -f $(VENV)/.dev-*
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	touch $@

run: $(STAMP)  ## Prepare the sample, train Phase 1 and Phase 2 on it (about 4 minutes on 2 cores)
	$(BIN)/python jobs/sample.py

test: $(DEV_STAMP)  ## Run the tests (about 15 minutes on 2 cores)
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(DEV_STAMP)  ## Run the tests that take minutes each
	$(BIN)/python -m pytest -q -m slow

lint: $(DEV_STAMP)  ## Check style and types
	$(BIN)/python -m ruff check ftlib jobs tests tune_spaces
	$(BIN)/python -m mypy ftlib

ui: $(STAMP)  ## Open MLflow's UI on this machine's runs (PORT=5000)
	$(BIN)/python jobs/track.py ui --port $(PORT)

soak: $(DEV_STAMP)  ## Kill training at random moments and compare with an undisturbed run (KILLS=30 SEED=0)
	$(BIN)/python tests/soak.py --kills $(KILLS) --seed $(SEED)

lock: $(DEV_STAMP)  ## Write requirements.lock anew: every package with its hashes (Linux x86-64, Python 3.11)
	{ echo '# Made by `make lock`: Linux x86-64, Python 3.11.'; \
	  $(BIN)/python -m uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_28 requirements.txt; } > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:  ## Remove .venv and the caches; data and runs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
