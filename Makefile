# Start with `make serve` or `make test`. Files are written to .venv and the cache folder only.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
HOST   ?= 127.0.0.1
PORT   ?= 8000
ARGS   ?=
PROXY   = $(VENV)/litellm-proxy
SERVING = $(VENV)/.serving-done
STAMP   = $(VENV)/.setup-done
INPUTS  = pyproject.toml setup.py scripts/setup.sh $(wildcard requirements/*.txt kernels/cpu/*)
# TORCH takes any pip requirement or options, e.g. TORCH="torch==2.13.0" for the default (CUDA) build.
INSTALL = PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" sh scripts/setup.sh

.PHONY: setup serve test gpu-test lint format bench nightly clean

setup: $(STAMP)

# What serving needs, without the tools that check the code.
$(SERVING): $(INPUTS)
	$(INSTALL) serving
	@touch $@

$(STAMP): $(INPUTS)
	$(INSTALL) everything
	@touch $(SERVING) $@

serve: $(SERVING)
	exec $(BIN)/chunkllama serve --host $(HOST) --port $(PORT) $(ARGS)

# One worker per processor; the tests of a file stay together and share its fixtures.
test: setup
	$(BIN)/python -m pytest -n logical --dist loadfile $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/load_test.py $(ARGS)

# Runs the tests that need a GPU.
gpu-test: setup
	$(BIN)/python -m pytest -m gpu $(ARGS)

# LiteLLM's proxy, whose versions of rich and others exclude the server's: it has its own environment.
$(PROXY)/bin/litellm: | $(STAMP)
	"$(BIN)/python" -m venv $(PROXY)
	"$(PROXY)/bin/python" -m pip install -q "litellm[proxy]>=1.80"

# Runs full sizes area by area; ARGS="SEED AREA..." runs some. Results: benchmarks/results/nightly.txt
nightly: setup $(PROXY)/bin/litellm
	"$(BIN)/python" -m pip install -q -e ".[clients,gates,routers,ray]"
	"$(BIN)/python" scripts/nightly.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
