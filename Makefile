# Two commands matter: `make quickstart` and `make test`. `make help` lists the rest.

# The first of these that exists; say PYTHON=... for another one (3.11 or newer).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Same version as the serving environment. An index that offers a CPU build of it
# (a version ending in +cpu) is preferred by pip over the much larger default one.
TORCH ?= torch==2.13.0
EXTRAS ?= dev

VENV := .venv
SERVE := .venv-serve
BIN := $(VENV)/bin

MODEL ?=
RECIPE ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
CHAOS_ARGS ?=
# avx2 has everything take this machine's CPU for one with AVX2 alone.
CPU ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHON

ifeq ($(CPU),avx2)
export PYTHONPATH := $(CURDIR)/scripts/avx2$(if $(PYTHONPATH),:$(PYTHONPATH))
export ATEN_CPU_CAPABILITY := avx2
export ONEDNN_MAX_CPU_ISA := AVX2
export MKL_ENABLE_INSTRUCTIONS := AVX2
endif

.DEFAULT_GOAL := help
.PHONY: help install serve-env quickstart bench-quality bench-ablation bench-data bench-faq \
	bench-serve prove-serving test test-gpu chaos fuzz upstream quality format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 15

$(VENV)/.ready: pyproject.toml
	@WATCH=$(VENV) scripts/progress.sh "Making $(VENV)" .cache/install.log \
		scripts/make_dev_env.sh $(VENV) "$(EXTRAS)" "$(TORCH)"

$(SERVE)/.ready: scripts/make_serve_env.sh pyproject.toml
	@WATCH=$(SERVE) scripts/progress.sh "Making $(SERVE)" .cache/serve-env.log \
		scripts/make_serve_env.sh $(SERVE)

install: $(VENV)/.ready ## .venv with everything for development

serve-env: $(SERVE)/.ready ## .venv-serve with vLLM for the CPU

quickstart: ## quantise, serve and compare a real model [MODEL=... RECIPE=... CPU=avx2]
	@echo "Quickstart: 10 to 15 minutes on 2 cores the first time, less after that."
	@since=$$(date +%s); $(MAKE) --no-print-directory --silent install && \
	$(BIN)/python scripts/quickstart.py --since $$since \
		$(if $(MODEL),--model "$(MODEL)") $(if $(RECIPE),--recipe "$(RECIPE)")

bench-quality: $(VENV)/.ready ## SliderQuant against its peers [BENCH_ARGS=--quick]
	$(BIN)/python -m benchmarks.quality $(BENCH_ARGS)

bench-ablation: $(VENV)/.ready ## what each part and default is worth [BENCH_ARGS=...]
	$(BIN)/python -m benchmarks.ablation $(BENCH_ARGS)

test: quality $(SERVE)/.ready ## quality, then all tests [PYTEST_ARGS=... CPU=avx2]
	$(BIN)/python -m pytest $(or $(PYTEST_ARGS),--least-cases 2000)

test-gpu: $(VENV)/.ready ## what runs on an NVIDIA GPU; skipped without one
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(BIN)/python -m pytest tests/gpu \
		$(PYTEST_ARGS)

fuzz: $(VENV)/.ready ## 50,000 generated cases, new ones every time
	$(BIN)/python -m pytest tests/unit -m generated --hypothesis-profile fuzz \
		--least-cases 50000 $(PYTEST_ARGS)

upstream: $(VENV)/.ready ## llm-compressor's own tests with this package imported
	$(BIN)/python scripts/upstream_suite.py

chaos: $(VENV)/.ready ## 50 runs killed at random moments, then compared [CHAOS_ARGS=...]
	$(BIN)/python tests/chaos.py --kills 50 $(CHAOS_ARGS)

bench-faq: $(VENV)/.ready $(SERVE)/.ready ## what regenerated calibration data brings [BENCH_ARGS=...]
	$(BIN)/python -m benchmarks.faq $(if $(MODEL),--smollm2 "$(MODEL)") $(BENCH_ARGS)

bench-data: $(VENV)/.ready ## the quickstart's data stage with ten seeds [BENCH_ARGS=...]
	$(BIN)/python -m benchmarks.data_stage $(if $(MODEL),--model "$(MODEL)") $(BENCH_ARGS)

bench-serve: $(VENV)/.ready $(SERVE)/.ready ## vLLM: bf16 and our formats [BENCH_ARGS=...]
	$(BIN)/python -m benchmarks.serving $(if $(MODEL),--model "$(MODEL)") $(BENCH_ARGS)

prove-serving: $(VENV)/.ready $(SERVE)/.ready ## vLLM computes what was trained [MODEL=...]
	$(BIN)/python -m benchmarks.prove_serving $(if $(MODEL),--model "$(MODEL)") \
		$(BENCH_ARGS)

quality: $(VENV)/.ready ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready ## rewrite the code the way quality wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove environments, downloads and caches
	rm -rf $(VENV) $(SERVE) .cache .pytest_cache .mypy_cache .ruff_cache build *.egg-info
