# Two commands for a fresh machine: `make quickstart` and `make test`.
# PIP_ARGS passes an index through, e.g. PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu".
# PYTHON is the interpreter (>= 3.11) that .venv is made with.
PYTHON ?= python3
PIP_ARGS ?=
VENV ?= .venv
VENV_LATEST ?= .venv-latest
HUGGING_FACE := diffusers transformers accelerate datasets huggingface-hub safetensors
RUN := $(VENV)/bin
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/vdm-hub-*/pyproject.toml))
OUTPUT ?= runs/digits
# accelerate gives a process one CPU thread unless told otherwise.
THREADS ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
RECIPE_ARGS ?=

# The tests start hundreds of interpreters, each of which would compile everything anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install install-plugins quickstart quickstart-short test test-plugins test-slow test-diffusers test-latest test-browser quality style docs mutants bench clean

help:  ## Show this list.
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-18s%s\n", $$1, $$2}' Makefile

# What an environment was installed from; a change of either file installs again.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python >= 3.11 is needed; this is %s. Set PYTHON=..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[test,quality]'
	@touch $@

install: $(VENV)/.installed  ## Create .venv and install vdm_hub with its test and quality tools.

quickstart: install  ## Train a VDM on digits, measure it, sample it, save it, and load it again (about 2 minutes).
	$(RUN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process $(THREADS) scripts/train.py digits --output_dir $(OUTPUT) --resume_from_checkpoint latest $(RECIPE_ARGS)
	$(RUN)/python scripts/quickstart.py $(OUTPUT)

install-plugins: install  ## Install the packages in plugins/, from where they are.
	$(RUN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt $(PIP_ARGS) $(PLUGINS:%=-e '%[test]')

# The core's tests run without any plugin, also where some are installed; afterwards all are.
test: install  ## Run the tests: the core's without plugins, then the plugins'.
	$(RUN)/pip uninstall -qq --yes $(notdir $(PLUGINS))
	$(RUN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)
	$(MAKE) test-plugins

test-plugins: install-plugins  ## Run the plugins' tests alone.
	$(RUN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS) plugins

test-slow:  ## Run the longer checks too.
	$(MAKE) test PYTEST_ARGS="-m 'slow or not slow'"

test-diffusers: install  ## Run diffusers' own scheduler, model and pipeline tests: DIFFUSERS_UPSTREAM=<a checkout>.
	@test -d "$(DIFFUSERS_UPSTREAM)/tests/schedulers" || { echo "set DIFFUSERS_UPSTREAM to a checkout of huggingface/diffusers"; exit 2; }
	$(RUN)/python -m pytest scripts/diffusers_upstream -n 2 -p no:cacheprovider -o pythonpath="$(abspath $(DIFFUSERS_UPSTREAM))" -o addopts="--import-mode=importlib -ra" -W ignore

# pip upgrades past what vdm_hub asks for, and warns of it: that is the point.
test-latest:  ## Run the Hub tests with the newest Hugging Face libraries, in an environment of its own.
	$(PYTHON) -m venv $(VENV_LATEST)
	grep '^torch==' constraints.txt > $(VENV_LATEST)/torch.txt
	$(VENV_LATEST)/bin/pip install --quiet --disable-pip-version-check -c $(VENV_LATEST)/torch.txt $(PIP_ARGS) -e '.[test]'
	$(VENV_LATEST)/bin/pip install --quiet --disable-pip-version-check -c $(VENV_LATEST)/torch.txt $(PIP_ARGS) --upgrade $(HUGGING_FACE)
	$(VENV_LATEST)/bin/pip list --disable-pip-version-check | grep -E '^(diffusers|transformers|accelerate|datasets|huggingface[-_]hub|safetensors|torch) '
	$(VENV_LATEST)/bin/python -m pytest tests/hub -n 2

# Only here: the other checks do without gradio and a browser.
$(VENV)/.browser: $(VENV)/.installed
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[space,browser]'
	@touch $@

# Skips, and says why, what needs Chromium where there is none.
test-browser: install-plugins $(VENV)/.browser  ## Try the app of `vdm-hub space` in a real browser: it needs an installed Chromium.
	$(RUN)/python -m pytest $(PYTEST_ARGS) tests/spaces
	$(RUN)/python -m pytest $(PYTEST_ARGS) plugins/vdm-hub-tokens/tests/test_space.py

model-card: quickstart  ## Train the digits and write their model card into model_cards/, as `vdm-hub publish` makes it.
	rm -rf build/card model_cards/vdm-digits
	$(RUN)/vdm-hub publish $(OUTPUT) me/vdm-digits --license apache-2.0 --remote_code --dry_run --output_dir build/card
	mkdir -p model_cards/vdm-digits
	cd build/card/main && cp -R README.md images evaluation.json history.json recipe.yaml run.json $(CURDIR)/model_cards/vdm-digits

quality: install  ## Check style, types and the floors.
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/mypy $(wildcard plugins/*/src plugins/*/*.py)
	$(RUN)/lint-imports

style: install  ## Mend what the style checks can mend by themselves.
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	$(RUN)/python scripts/house.py

# Only here: the tests and the other checks do without mkdocs. The variable is of mkdocs-material, which is pinned.
$(VENV)/.docs: $(VENV)/.installed
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs  ## Make the site of README and docs/, with a reference of all public names: build/site/index.html.
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

# Only here: the tests and the other checks do without mutmut.
$(VENV)/.mutants: $(VENV)/.installed
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[mutants]'
	@touch $@

mutants: $(VENV)/.mutants  ## Change the code line by line, and name what no test notices: MODULE=a module (default: all; hours).
	$(RUN)/python scripts/mutants.py $(MUTANTS_ARGS) $(MODULE)

bench: install  ## Time training and sampling steps over the bare network, and print the digits' three seeds.
	$(RUN)/python scripts/bench/train_step.py
	$(RUN)/python scripts/bench/sample_step.py
	$(RUN)/python scripts/bench/compare_diffusers.py
	$(RUN)/python scripts/bench/digits_seeds.py

clean:  ## Remove what the commands above made, except runs/.
	rm -rf $(VENV) $(VENV_LATEST) build dist *.egg-info plugins/*/build plugins/*/*.egg-info plugins/*/src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
