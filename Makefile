# Every command that a developer or an operator types here. `make help` lists them.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
WORKSPACE ?= workspace
# gpu or cpu: what `make setup` installs and `make images` builds. A machine with nvidia-smi has a GPU.
FLAVOUR ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
STAMP := $(VENV)/.installed-$(FLAVOUR)

# PyTorch's CPU wheels are on its own index; pip's own sources are tried first.
TORCH := torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

COMPOSE := docker compose -f compose.yaml
COMPOSE_CPU := $(COMPOSE) -f compose/cpu.yaml
DEMO := $(COMPOSE_CPU) -f compose/pipeline.yaml -f compose/demo.yaml run --rm --no-deps -T

export EYRIE_REVISION ?= $(shell git describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)
export EYRIE_SOURCE ?= $(shell git remote get-url origin 2>/dev/null || echo unknown)
export EYRIE_WORKSPACE := $(WORKSPACE)
# Engines and torch use every core they find, and two processes that both do so slow each other down.
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the commands.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(STAMP) ## Make .venv at the locked versions, with vLLM for this machine; FLAVOUR=gpu or cpu.

.PHONY: venv
venv:
	@[ -z "$(filter-out $(STAMP),$(wildcard $(VENV)/.installed-*))" ] \
	  || { echo "$(VENV) is of the other flavour than FLAVOUR=$(FLAVOUR): run make clean first"; exit 2; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "eyrie needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-gpu: requirements-gpu.lock
	@$(MAKE) --no-print-directory venv
	$(PY) -m pip install --quiet --no-deps --require-hashes --requirement requirements-gpu.lock
	touch $@

$(VENV)/.installed-cpu: requirements.lock
	@$(MAKE) --no-print-directory venv
	$(PY) -m pip install --quiet "$(TORCH)" \
	  || $(PY) -m pip install --quiet --index-url $(TORCH_INDEX) "$(TORCH)"
	$(PY) -m pip install --quiet --no-deps --require-hashes --requirement requirements.lock
	touch $@

.PHONY: demo
demo: setup ## All four stages on a small target made on the spot; less than eight minutes on two cores.
	$(PY) -m stages.demo make-target "$(WORKSPACE)/targets/demo"
	$(PY) -m stages.ops run --recipe compose/recipes/demo/recipe.yaml

# quarter: a narrow domain, the shorter one (compose/recipes/first-hour/laptop.md has times). night: all kinds of prompts.
TIER ?= quarter
REAL_night := --domain broad --num_prompts 5000 --num_held_out 96

.PHONY: real
# As it was typed: neither make nor the shell reads it.
real: override export PROMPTS := $(value PROMPTS)
real: setup ## The chain on a pretrained model, SmolLM2-135M: TIER=quarter or night, PROMPTS=yours (a file, folder, glob or hub data set).
	@[ -f compose/recipes/smollm2/$(TIER).yaml ] \
	  || { echo "TIER: expected quarter or night, found $(TIER)"; exit 2; }
	$(PY) -m stages.demo real-target "$(WORKSPACE)/targets/smollm2-$(TIER)" $(REAL_$(TIER)) \
	  $(if $(PROMPTS),--prompts "$$PROMPTS") $(filter --overwrite,$(OPTIONS))
	$(PY) -m stages.ops run --recipe compose/recipes/smollm2/$(TIER).yaml $(OPTIONS)

.PHONY: images
images: ## Build the images of the four stages and ops; FLAVOUR=gpu or cpu.
	$(if $(filter cpu,$(FLAVOUR)),$(COMPOSE_CPU),$(COMPOSE)) --profile stages --profile tools build

# Whatever .env says of another run.
.PHONY: demo-compose
demo-compose: export EYRIE_RUN := demo
demo-compose: export EYRIE_RECIPE = ./compose/recipes/$(EYRIE_RUN)/recipe.yaml
demo-compose: export EYRIE_WORKSPACE := workspace
demo-compose: ## The demo in containers, on the CPU; the workspace is a docker volume.
	@echo "demo-compose: building five images; five minutes the first time"
	$(COMPOSE_CPU) --profile stages --profile tools build
	@step=0; for stage in target synth dump train bench; do \
	  step=$$((step + 1)); echo "demo-compose: $$step of 5: $$stage"; \
	  $(DEMO) $$stage || { code=$$?; echo "demo-compose: $$stage ended with exit code $$code;" \
	    "make demo-compose continues from there"; exit $$code; }; \
	done
	@mkdir -p "$(WORKSPACE)" && $(DEMO) --entrypoint cat ops /workspace/$(EYRIE_RUN)/bench/report.html \
	  > "$(WORKSPACE)/$(EYRIE_RUN)-report.html"
	@echo "demo-compose: report=$(WORKSPACE)/$(EYRIE_RUN)-report.html;" \
	  "all results: volume $${EYRIE_VOLUMES:-eyrie}_workspace, folder $(EYRIE_RUN)"

# The demo runs alone, since its time is a promise; the other test files take one core each.
.PHONY: test
test: setup test-quick ## Every test but the soak, on real engines and images; three quarters of an hour on two slow cores.
	export EYRIE_TEST_WORKSPACE="$$(mktemp --directory)"; set -e; \
	trap 'rm -rf "$$EYRIE_TEST_WORKSPACE"' EXIT; \
	$(PY) -m pytest tests/engine/test_demo.py; \
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --durations 20 -m "not soak" \
	  --deselect tests/engine/test_demo.py tests/containers tests/engine tests/stages

.PHONY: soak
soak: setup ## The tests that take longer.
	$(PY) -m pytest -m soak

.PHONY: test-quick
test-quick: setup ## The tests that start no engine: a few minutes.
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto -m "not engine and not gpu and not container" tests/quick

# No setup: it needs no network, and takes the Python that there is.
.PHONY: gpu-check
gpu-check: ## Tests, benchmark and profile of a machine with a card; PEERS= an environment with speculators.
	$(or $(wildcard $(PY)),$(PYTHON)) -m tests.gpu --out tests/perf/gpu-check \
	  $(if $(PEERS),--peer-python "$(PEERS)/bin/python")

.PHONY: lint
lint: setup ## Style, types, import rules.
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

.PHONY: format
format: setup ## Format the sources.
	$(PY) -m ruff format
	$(PY) -m ruff check --fix

.PHONY: lock
lock: setup ## Resolve both lock files from pyproject.toml; needs uv on PATH for the GPU's.
	$(PY) -m piptools compile --quiet --generate-hashes --strip-extras --no-header --no-emit-find-links \
	  --no-emit-index-url --no-emit-options \
	  --extra cpu --extra real --extra dev --output-file requirements.lock pyproject.toml \
	  --unsafe-package torch --unsafe-package torchvision --unsafe-package torchaudio \
	  --unsafe-package torchcodec
	sed -i '/^# WARNING: The following/,$$d' requirements.lock  # torch is pinned above, not there
	uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-header \
	  --generate-hashes --extra gpu --extra real --extra dev --output-file requirements-gpu.lock pyproject.toml

.PHONY: clean
clean: ## Remove the virtual environment and caches; keep the workspace.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
