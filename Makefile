# One command each: `make study` runs the whole study, `make test` proves the project. `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
# VENV=none uses the python at hand instead of a .venv of the project's own
VENV ?= .venv
ifneq ($(words $(VENV)),1)
  $(error VENV takes a path without blanks (the checkout's own may have some), got '$(VENV)')
endif
ifeq ($(VENV),none)
  BIN :=
  READY := at-hand
else
  BIN := $(VENV)/bin/
  READY := $(VENV)/.ready
endif


# caches go into data/runs where the home folder takes none (a container's, another user's)
TAKES_CACHES := $(shell for f in "$${XDG_CACHE_HOME:-$$HOME/.cache}" "$$HOME"; do \
  if test -e "$$f"; then test -d "$$f" -a -w "$$f" && echo yes; break; fi; done)
ifneq ($(TAKES_CACHES),yes)
  export XDG_CACHE_HOME := $(CURDIR)/data/runs/.cache
  export MPLCONFIGDIR ?= $(XDG_CACHE_HOME)/matplotlib
  export IPYTHONDIR ?= $(XDG_CACHE_HOME)/ipython
  export JUPYTER_DATA_DIR ?= $(XDG_CACHE_HOME)/jupyter
  export JUPYTER_CONFIG_DIR ?= $(XDG_CACHE_HOME)/jupyter
  export TRITON_CACHE_DIR ?= $(XDG_CACHE_HOME)/triton
endif

# `$(call fitting,PROGRAM)` is empty if that is a Python that setup.py takes, else what it is instead
FOUND = import sys; print(*sys.version_info[:3], sep='.', end=' at '); print(sys.executable)
fitting = $(filter-out 3.11.% 3.12.% 3.13.%,$(firstword $(call found,$(1))))
found = $(or $(shell "$(1)" -c "$(FOUND)" 2>/dev/null),no $(1))
NEEDED := Python 3.11 to 3.13 is needed

.PHONY: help setup browser test lab readme execute at-hand
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(READY)  ## make .venv and install everything (VENV=none: nothing to do)

# these are empty or an error: a recipe's lines are expanded before the first of them runs
python_fits = $(if $(call fitting,$(PYTHON)),$(error $(NEEDED), found $(call found,$(PYTHON)): \
  make setup PYTHON=python3.11))
venv_fits = $(if $(call fitting,$(VENV)/bin/python),$(error $(NEEDED), $(VENV) has \
  $(call found,$(VENV)/bin/python): remove it (rm -r $(VENV)), then make setup PYTHON=python3.11))
at_hand_fits = $(if $(call fitting,python),$(error $(NEEDED), found $(call found,python): \
  with VENV=none the first `python` of PATH is used))

at-hand:
	$(at_hand_fits)

# made again only when what it is made from changes
$(VENV)/.ready: settings.ini constraints.txt setup.py pyproject.toml
	$(if $(wildcard $(VENV)/bin/python),$(venv_fits),$(python_fits))
	test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[study,dev]'
	touch $@

# what looks at the figures: a browser, what knows the installed fonts, and the figures' two faces
BROWSER_PACKAGES := chromium fontconfig fonts-dejavu-core fonts-dejavu-extra
define GET_BROWSER
has_all() {
  { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null &&
    command -v fc-match >/dev/null && fc-list 'DejaVu Sans:style=Oblique' | grep -q .
}
install() {
  $$become env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Acquire::Retries=1 -o Acquire::http::Timeout=20 \
    -o DPkg::Lock::Timeout=60 "$$@"
}
if has_all; then exit; fi
become=
if test "$$(id -u)" != 0; then become='sudo -n'; fi
# the lists of packages may be missing or old
wanted='install --no-install-recommends $(BROWSER_PACKAGES)'
install $$wanted >/dev/null 2>&1 || { install update && install $$wanted; }
if has_all; then exit; fi
echo 'Figures cannot be looked at. Install a browser and fonts by hand, in Debian: $(BROWSER_PACKAGES)'
exit 1
endef
export GET_BROWSER

browser:  ## install what looks at the figures, by apt-get as root or by sudo: Debian's chromium and fonts
	@bash -c "$$GET_BROWSER"

# -rs: what was skipped and why, as the figures without a browser
test: $(READY)  ## clean, export, diff, form; run the library notebooks, the smoke study (runs/ and figs/), then pytest (which looks at the figures: make browser)
	$(BIN)python .ci/check.py
	$(BIN)python .ci/outputs.py
	$(MAKE) study SCALE=smoke SWEEP=
	$(BIN)python -m pytest -n 2 --dist worksteal -rs

lab: $(READY)  ## open the notebooks
	$(BIN)jupyter lab nbs

execute: $(READY)  ## run notebooks in place and keep their outputs: make execute NB="nbs/lib/01_estimators.ipynb"
	$(BIN)jupyter execute --inplace $(NB)
	for f in $(NB); do $(BIN)nbdev_clean --fname $$f; done

readme: $(READY)  ## write README.md from nbs/index.ipynb
	$(BIN)python .ci/readme.py

# ---- the study ----
# SCALE=smoke|desk|gpu|paper, SWEEP="names" (none: all of the scale), BUDGET=seconds, MISSING=1 (only what data/results lacks), ARGS for Snakemake,
# DIRTY=1 (desk and above: also from changes that are in no commit), BFLOAT16=1 (also on a CPU without instructions for it)
SCALE ?= smoke
SWEEP ?=
BUDGET ?=
MISSING ?=
DIRTY ?=
BFLOAT16 ?=
COMMIT ?=
FRESH ?=
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
GPUS ?= $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
ARGS ?=
ENGINE = $(BIN)python -m snakemake --cores $(CORES) $(if $(filter-out 0,$(GPUS)),--resources gpu=$$(($(GPUS) * $${VQSTUDY_GPU_SLOTS:-1}))) --keep-going --nolock --drop-metadata \
  --quiet rules host reason --config scale=$(SCALE) sweep="$(SWEEP)" budget=$(BUDGET) missing=$(MISSING) dirty=$(DIRTY) bfloat16=$(BFLOAT16)

.PHONY: study resume dry-run sweep confirm bench figures
study: $(READY)  ## run what is missing or stale, collect, draw: make study SCALE=desk SWEEP=huh_tab03 BUDGET=600
	$(ENGINE) $(ARGS)

resume: study  ## go on after a failure, a kill or a time budget (the same as study: records alone say what is done)

dry-run: $(READY)  ## list the cells: what is here, what is in the results, what would run
	$(BIN)python -m vqstudy.study plan --scale $(SCALE) --sweep "$(SWEEP)" $(if $(MISSING),--missing)

sweep: MISSING = 1
sweep: $(READY)  ## run a sweep, or "several sweeps" of which one takes another's weights, from a worktree of a commit of their own, beside which you can edit: make sweep SWEEP=huh_tab03 SCALE=desk COMMIT=1 (rows are committed as they come), FRESH=1 (begin again)
	$(BIN)python -m vqstudy.study sweep --scale $(if $(filter smoke,$(SCALE)),desk,$(SCALE)) --sweep "$(SWEEP)" $(if $(FRESH),--fresh) $(if $(COMMIT),--commit) -- \
	  $(subst scale=smoke,scale=desk,$(ENGINE)) $(ARGS)

confirm: $(READY)  ## after a change of the code: run a few cells again, whose rows are current if nothing changed: make confirm SWEEP=huh_tab03
	$(BIN)python -m vqstudy.study confirm --scale $(if $(filter smoke,$(SCALE)),desk,$(SCALE)) --sweep "$(SWEEP)" $(if $(DIRTY),--dirty)

bench: $(READY)  ## measure speed and memory against peers, collect, draw; one cell at a time, on a quiet machine (SCALE=gpu: on a GPU)
	$(MAKE) study SCALE=$(if $(filter gpu,$(SCALE)),gpu,desk) SWEEP="bench_search bench_step bench_router bench_overhead" CORES=2

figures: $(READY)  ## redraw figures/ from the committed results, without the engine
	$(BIN)python -m vqstudy.study redraw
	$(BIN)nbdev_clean --fname nbs/figs
