# make install | demo | test | chaos | browser | studies | lint | bench-steering | bench-melbo |
#      bench-orchestrator | bench-storage | bench-tuning | bench-gpu | lock

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV_VERSION := 0.13.8

# The first of these that is Python 3.11 or 3.12; `make install PYTHON=/path/to/python` to choose another.
SUPPORTED := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(firstword $(foreach python,python3.11 python3.12 python3,\
	$(shell $(python) -c '$(SUPPORTED)' 2>/dev/null && echo $(python))))

PIP := $(BIN)/python -m pip --disable-pip-version-check -q
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

.DEFAULT_GOAL := install
.DELETE_ON_ERROR:
.PHONY: install demo test chaos browser studies lint bench-steering bench-melbo bench-orchestrator bench-storage \
	bench-tuning bench-gpu lock

install: $(STAMP)

$(BIN)/python:
	@"$(or $(PYTHON),false)" -c '$(SUPPORTED)' 2>/dev/null || { \
		echo "steersweep needs Python 3.11 or 3.12$(if $(PYTHON),; $(PYTHON) is neither,)." \
			"Name one: make install PYTHON=/path/to/python" >&2; \
		exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch comes first and by itself: the same pin is a CPU or a CUDA build, depending on the machine, so no hash
# fits both. --no-deps: the lock is complete, and two of its packages declare more than they need (see
# pyproject.toml). The stamp is written last: it says that every step worked.
$(STAMP): requirements.lock pyproject.toml | $(BIN)/python
	$(PIP) install $(TORCH)
	$(PIP) install --no-deps --require-hashes -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation -e .
	$(BIN)/steersweep models add smollm2-135m
	$(BIN)/steersweep models add all-minilm-l6-v2
	@touch $@

demo: install
	$(BIN)/steersweep run search_spaces/tone_grid.py --out runs/demo

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The kills that `make test` leaves out; writes benchmarks/results/chaos.json.
chaos: install
	$(BIN)/python -m benchmarks.chaos

# The pages in a real browser: chromium and chromedriver, which Debian has as chromium and chromium-driver.
browser: install
	$(BIN)/python -m pytest -m browser tests/test_browser.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# About four hours on 2 cores; prints the tables of docs/studies.
studies: install
	for name in goldilocks rpq stability prompts capability backdoors; do \
		$(BIN)/python -m examples.studies.$$name --out runs/studies/$$name || exit 1; \
	done

# About 40 minutes on 2 cores; writes benchmarks/results/memory.json and steering.json.
bench-steering: install
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.steering

# Hours on 2 cores; writes benchmarks/results/melbo.json, one R after another, and dct.json.
bench-melbo: install
	$(BIN)/python -m benchmarks.dct
	$(BIN)/python -m benchmarks.melbo

# About half an hour on 2 cores; writes benchmarks/results/orchestrator.json.
bench-orchestrator: install
	$(BIN)/python -m benchmarks.orchestrator

# About half an hour on 2 cores; writes benchmarks/results/storage.json.
bench-storage: install
	$(BIN)/python -m benchmarks.storage

# About half an hour on 2 cores; writes benchmarks/results/tuning.json.
bench-tuning: install
	$(BIN)/python -m benchmarks.tuning

# Needs a GPU; writes benchmarks/results/gpu.json.
bench-gpu: install
	$(BIN)/python -m benchmarks.gpu

# Writes requirements.lock from the pins in pyproject.toml; [tool.uv] there says what is left out, and why.
# Indirect packages stay as they are locked; `make lock UPGRADE=--upgrade` moves them to their newest.
lock: | $(BIN)/python
	$(PIP) install uv==$(UV_VERSION)
	$(BIN)/uv pip compile pyproject.toml --all-extras --group build \
		--universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
		--no-emit-package torch --no-header --no-annotate --quiet $(UPGRADE) --output-file requirements.lock
