# Two commands: `make demo` and `make test`. Both make .venv and install what they need on the first run.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Python compiles what is imported; compiling all 25,000 files of the packages at once takes a minute for nothing.
PIP := $(PY) -m pip install --quiet --no-compile --constraint constraints.txt

# A ComfyUI for the host tests: COMFYUI_PATH, else ~/comfy/ComfyUI, else the one whose custom_nodes this folder is in.
ifeq ($(origin COMFYUI_PATH),undefined)
COMFYUI_PATH := $(patsubst %/main.py,%,$(firstword $(wildcard $(HOME)/comfy/ComfyUI/main.py $(abspath ../..)/main.py)))
endif
export COMFYUI_PATH
HOST_REQUIREMENTS := $(if $(COMFYUI_PATH),$(wildcard $(COMFYUI_PATH)/requirements.txt))
HOST_STAMP := $(if $(HOST_REQUIREMENTS),$(VENV)/.installed-host$(subst /,_,$(COMFYUI_PATH)))

# mypy reads the pack as a host does, as one package with a name of its own.
PACK := build/types/faithdiff_pack

.PHONY: help demo test test-full fuzz soak lint types format install host-note clean

help:
	@echo "make demo       restore a photograph with a small model; writes demo_output/"
	@echo "make test       style, types and all tests"
	@echo "make test-full  the same with the slow tests (full-size weights: minutes, 12 GB of disk, 8 GB of memory)"
	@echo "make fuzz       mutated weights, images, configurations and prompts for MINUTES (30), from SEED (1) on"
	@echo "make soak       PROMPTS (1000) on one ComfyUI server; memory, threads and open files must not grow"
	@echo "make lint       ruff and mypy only"
	@echo "make format     ruff's fixes and formatting"
	@echo "make clean      remove what the commands above made, .venv included"

demo: install
	$(PY) demo/run.py

# One process a core, four at most; the tests of a file share a server or a model, so they stay together.
test: lint host-note
	$(PY) -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-full: lint host-note
	$(PY) -m pytest -m "slow or not slow"

MINUTES ?= 30
SEED ?= 1
fuzz: install host-note
	PYTHONPATH=tests:tools $(PY) -m fuzz --minutes $(MINUTES) --seed $(SEED)

PROMPTS ?= 1000
soak: install host-note
	PYTHONPATH=tests:tools $(PY) -m fuzz.soak --prompts $(PROMPTS) --seed $(SEED)

lint: install types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: install $(PACK)
	MYPYPATH=build/types:docs/examples $(PY) -m mypy -p faithdiff_pack.faithdiff_core -p faithdiff_pack.nodes -m restore_over_http
	MYPYPATH=tools:tests:scripts:demo:docs/examples $(PY) -m mypy --explicit-package-bases benchmarks demo scripts tests tools

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

install: $(VENV)/.installed

$(PY):
	$(PYTHON) -m venv $(VENV)

# The stamps are newer than what they were installed from, so pip runs again only after a change.
$(VENV)/.installed: pyproject.toml constraints.txt | $(PY)
	$(PIP) --editable ".[engine,test]"
	@touch $@

$(HOST_STAMP): $(HOST_REQUIREMENTS) constraints.txt $(VENV)/.installed
	$(PIP) --requirement "$(COMFYUI_PATH)/requirements.txt"
	@touch $@

host-note: $(HOST_STAMP)
ifeq ($(HOST_STAMP),)
	@echo "*** NO COMFYUI FOUND: THE HOST TESTS ARE SKIPPED. Set COMFYUI_PATH to the folder with ComfyUI's main.py to run them. ***"
endif

$(PACK):
	@mkdir -p $(@D)
	@ln -sfn ../.. $@

clean:
	rm -rf $(VENV) build dist demo_output *.egg-info .pytest_cache .ruff_cache .mypy_cache
