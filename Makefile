# `make demo` shows everything at once, `make test` checks everything, `make quick` the fast part, `make docs` builds the site.
# Each makes .venv when it is missing.

PYTHON ?= python3
VENV := .venv
DYADLM := $(VENV)/bin/dyadlm
INSTALLED := $(VENV)/.installed
DEMO := demo
# About four minutes of training on two cores.
STEPS ?= 1500
RUN := $(DEMO)/run
# The optional dependencies to install and so to test: dev, and peft or lm-eval beside it.
EXTRAS ?= dev

.DELETE_ON_ERROR:
.PHONY: demo setup quick test lint types docs notebook clean-demo lock wheel wheel-test lowest-test

# ---- Environment: made once, and again when what it follows from changes

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

# ---- Demo: every step leaves a file, so that an interrupted demo goes on where it was

demo: $(DEMO)/report/README.md
	@cat $(DEMO)/evaluation.txt $(DEMO)/sample.txt
	@echo "Read $(DEMO)/report/README.md, and go on: $(DYADLM) generate $(RUN) --prompt 'HAMLET:'"

$(DEMO)/corpus: | $(INSTALLED)
	mkdir -p $(DEMO)
	$(DYADLM) data fetch shakespeare > $@

# --resume begins at step 0 where there is nothing to resume.
$(DEMO)/trained: $(DEMO)/corpus
	$(DYADLM) train --preset tiny --data shakespeare --output $(RUN) --device cpu --resume \
		--set max_steps=$(STEPS)
	touch $@

$(DEMO)/evaluation.txt: $(DEMO)/trained
	$(DYADLM) evaluate $(RUN) --data shakespeare --device cpu > $@

$(DEMO)/sample.txt: $(DEMO)/trained
	$(DYADLM) generate $(RUN) --prompt 'HAMLET:' --seed 1 --device cpu > $@

$(DEMO)/report/README.md: $(DEMO)/evaluation.txt $(DEMO)/sample.txt
	rm -rf $(DEMO)/report
	$(DYADLM) report $(RUN) --output $(DEMO)/report --prompt 'HAMLET:' --device cpu

clean-demo:
	rm -rf $(DEMO)

# ---- Checks

quick: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 -m "not slow"

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(INSTALLED)
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --config-file benchmarks/mypy.ini

# ---- Documents

# The packages of the extra `docs`, beside those of EXTRAS.
$(VENV)/.docs: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# Fails on every warning: a page that no menu names, a link that leads nowhere, a docstring that cannot be read.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "Open site/index.html; with search: $(VENV)/bin/python -m http.server --directory site"

# Runs the notebook anew, with its training; the outputs are stored in it.
notebook: $(VENV)/.docs
	$(VENV)/bin/python notebooks/run.py

# ---- Versions

# Needs uv. The lock names every package that any extra installs, with the hashes of its files.
lock:
	uv pip compile --quiet pyproject.toml --all-extras --constraint constraints.txt --generate-hashes \
		--python-version 3.11 --universal --output-file requirements.lock

# ---- Release. Needs no .venv: the tools are installed into one of their own.

RELEASE := .release
BUILDER := $(RELEASE)/bin/python

$(BUILDER):
	$(PYTHON) -m venv $(RELEASE)
	$(BUILDER) -m pip install --quiet build twine uv

# A source distribution and a wheel in dist/.
wheel: $(BUILDER)
	rm -rf dist
	$(BUILDER) -m build --outdir dist .
	$(BUILDER) -m twine check --strict dist/*

# The wheel in a fresh environment: trains, generates, scores.
wheel-test: wheel
	PYTHON=$(PYTHON) release/wheel.sh dist/*.whl

# The fast tests with the smallest versions that pyproject.toml allows.
lowest-test: $(BUILDER)
	PYTHON=$(PYTHON) UV=$(RELEASE)/bin/uv release/lowest.sh
