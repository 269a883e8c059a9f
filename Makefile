# One command each: `make study` runs the whole study, `make test` proves the project. `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
# VENV=none uses the python at hand instead of a .venv of the project's own
VENV ?= .venv
ifeq ($(VENV),none)
  BIN :=
  READY :=
else
  BIN := $(VENV)/bin/
  READY := $(VENV)/.ready
endif

.PHONY: help setup test lab readme execute
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(READY)  ## make .venv and install everything (VENV=none: nothing to do)

# made again only when what it is made from changes
$(VENV)/.ready: settings.ini constraints.txt setup.py pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[study,dev]'
	touch $@

test: $(READY)  ## clean, export, diff, form; run the library notebooks, the smoke study (runs/ and figs/), then pytest
	$(BIN)python .ci/check.py
	$(BIN)python .ci/outputs.py
	$(MAKE) study SCALE=smoke SWEEP=
	$(BIN)python -m pytest -n 2 --dist worksteal

lab: $(READY)  ## open the notebooks
	$(BIN)jupyter lab nbs

execute: $(READY)  ## run notebooks in place and keep their outputs: make execute NB="nbs/lib/01_estimators.ipynb"
	$(BIN)jupyter execute --inplace $(NB)
	for f in $(NB); do $(BIN)nbdev_clean --fname $$f; done

readme: $(READY)  ## write README.md from nbs/index.ipynb
	$(BIN)python .ci/readme.py

# ---- the study ----
# SCALE=smoke|desk|gpu|paper, SWEEP="names" (none: all of the scale), BUDGET=seconds, MISSING=1 (only what data/results lacks), ARGS for Snakemake
SCALE ?= smoke
SWEEP ?=
BUDGET ?=
MISSING ?=
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
GPUS ?= $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
ARGS ?=
ENGINE = $(BIN)python -m snakemake --cores $(CORES) $(if $(filter-out 0,$(GPUS)),--resources gpu=$$(($(GPUS) * $${VQSTUDY_GPU_SLOTS:-1}))) --keep-going --nolock --drop-metadata \
  --quiet rules host reason --config scale=$(SCALE) sweep="$(SWEEP)" budget=$(BUDGET) missing=$(MISSING)

.PHONY: study resume dry-run bench figures
study: $(READY)  ## run what is missing or stale, collect, draw: make study SCALE=desk SWEEP=huh_tab03 BUDGET=600
	$(ENGINE) $(ARGS)

resume: study  ## go on after a failure, a kill or a time budget (the same as study: records alone say what is done)

dry-run: $(READY)  ## list the cells: what is here, what is in the results, what would run
	$(BIN)python -m vqstudy.study plan --scale $(SCALE) --sweep "$(SWEEP)" $(if $(MISSING),--missing)

bench: $(READY)  ## measure speed and memory against peers, collect, draw; one cell at a time, on a quiet machine (SCALE=gpu: on a GPU)
	$(MAKE) study SCALE=$(if $(filter gpu,$(SCALE)),gpu,desk) SWEEP="bench_search bench_step bench_router bench_overhead" CORES=2

figures: $(READY)  ## redraw figures/ from the committed results, without the engine
	$(BIN)python -m vqstudy.study redraw
	$(BIN)nbdev_clean --fname nbs/figs
