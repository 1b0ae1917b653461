# Everything a person types. `make` alone lists it.
# Needs Python 3.10 or newer as python3 (or PYTHON=...); no GPU and no running service.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The environment is made again when what it is made of changes.
RUNTIME = requirements.txt $(wildcard requirements.lock) pyproject.toml
STAMP = $(VENV)/.installed-$(shell cat $(RUNTIME) | (sha256sum 2>/dev/null || shasum -a 256) | cut -c1-12)
DEV_STAMP = $(VENV)/.dev-$(shell cat $(RUNTIME) requirements-dev.txt | (sha256sum 2>/dev/null || shasum -a 256) | cut -c1-12)
SOURCES := ftlib jobs tests tune_spaces
PORT ?= 5000
KILLS ?= 30
SEED ?= 0
FAULTS ?= kill
OVER ?= workers
# TORCH=cpu installs torch's CPU build (200 MB instead of 5 GB), without the lock's hashes.
TORCH ?=

.DEFAULT_GOAL := help
.PHONY: help run test test-slow gpu check format ui soak cluster-test docs-images lock install \
  install-dev clean

help:  ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) \
	  | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

install: $(STAMP)  ## Make .venv and install ftlib with what it stands on (TORCH=cpu: without CUDA)
install-dev: $(DEV_STAMP)  ## The same, with what the tests and the gate need

# The lock names the exact files (with their hashes) of one platform and Python; elsewhere the
# pinned versions are installed without it.
$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-*
	if test -n "$(TORCH)"; then \
	  $(PIP) install "$$(grep -E '^uv==' requirements-dev.txt)" && \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend $(TORCH) -r requirements.txt; \
	elif test -f requirements.lock && $(PIP) install --require-hashes --only-binary :all: \
	    -r requirements.lock 2>$(VENV)/lock.log; then \
	  echo "installed from requirements.lock, every file checked against its hash"; \
	else \
	  test ! -f requirements.lock || echo "requirements.lock does not fit this platform or Python" \
	    "($$(tail -n 1 $(VENV)/lock.log | cut -c1-120)); installing requirements.txt without hashes"; \
	  $(PIP) install -r requirements.txt; \
	fi
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

$(DEV_STAMP): $(STAMP)
	rm -f $(VENV)/.dev-*
	$(PIP) install -r requirements-dev.txt
	touch $@

run: $(STAMP)  ## Prepare the sample and train the phases on it (2 to 5 minutes on 2 cores)
	$(BIN)/python jobs/sample.py

test: $(DEV_STAMP)  ## Run the tests (about 20 minutes on 2 cores)
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(DEV_STAMP)  ## Run the tests that take minutes each
	$(BIN)/python -m pytest -q -m slow

# Nothing is installed or downloaded here: a machine with a GPU may have no network.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_NEEDS = torch torchvision ray mlflow albumentations cv2 simplejpeg pytest pytest_timeout
gpu:  ## Tests and benchmark of a GPU, in at most 9 minutes (SOURCE=PICTURES TIMM=train.py)
	@$(GPU_PYTHON) -c 'import importlib.util as u, sys; \
	  no = [name for name in sys.argv[1:] if u.find_spec(name) is None]; \
	  sys.exit("not installed: " + ", ".join(no) + ". Run make install-dev" if no else 0)' $(GPU_NEEDS)
	@$(GPU_PYTHON) -c 'import torch; n = torch.cuda.device_count(); \
	  print([torch.cuda.get_device_name(i) for i in range(n)] or "no GPU: the same on the CPU")'
	timeout 230 $(GPU_PYTHON) -m pytest -v -m gpu tests; tests=$$?; \
	PYTHONPATH=. timeout 300 $(GPU_PYTHON) jobs/benchmark.py --what gpu \
	  $$($(GPU_PYTHON) -c 'import torch; print( \
	    "--arch resnet50 --size 224 --batch 256 --steps 20 --rounds 3" \
	    if torch.cuda.is_available() else \
	    "--arch resnet18 --size 32 --batch 4 --steps 2 --rounds 1")') \
	  --workers $$(( $$(nproc) - 1 )) --out gpu \
	  $(if $(SOURCE),--source $(SOURCE)) $(if $(TIMM),--timm $(TIMM)) && exit $$tests

check: $(DEV_STAMP)  ## The gate: format, lint and types
	$(BIN)/python -m ruff format --check $(SOURCES)
	$(BIN)/python -m ruff check $(SOURCES)
	$(BIN)/python -m mypy

format: $(DEV_STAMP)  ## Lay the code out and mend what the linter can
	$(BIN)/python -m ruff format $(SOURCES)
	$(BIN)/python -m ruff check --fix $(SOURCES)

ui: $(STAMP)  ## Open MLflow's UI on this machine's runs (PORT=5000)
	$(BIN)/python jobs/track.py ui --port $(PORT)

soak: $(DEV_STAMP)  ## Break jobs at random moments (KILLS=30 SEED=0 OVER=sweep FAULTS=kill)
	$(BIN)/python tests/soak.py --over $(OVER) --kills $(KILLS) --seed $(SEED) --faults $(FAULTS)

cluster-test: $(DEV_STAMP)  ## Start cluster.yaml on three machines of namespaces, break them (root)
	$(BIN)/python -m pytest -q -rs tests/test_cluster_hosts.py

docs-images: $(DEV_STAMP)  ## Make the pictures in docs/images that show reports and figures again
	PYTHONPATH=. $(BIN)/python tests/docs_images.py

lock: $(DEV_STAMP)  ## Bring requirements.lock up to date (UPGRADE=1: newest versions of everything below)
	$(BIN)/python -m uv pip compile --quiet --generate-hashes --no-header --no-annotate \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 $(if $(UPGRADE),--upgrade) \
	  --output-file requirements.lock requirements.txt > /dev/null
	sed -i '1i # Made by `make lock`: Linux x86-64, Python 3.11.' requirements.lock

clean:  ## Remove .venv and the caches; data and runs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
