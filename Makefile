# make demo    a bundle of the reference model `scenes` and captioned pictures by each guidance, in demo/
# make report  FP32, FP16 and INT8 of it side by side on a page, demo/report.html; make demo/report.png: as Chromium shows it
# make wheel   a wheel of sg-export, in dist/: `pip install 'WHEEL[ort]'` installs it on a machine that serves
# make check   the tests for every change: all but the slow ones
# make test    all tests that need no GPU
# make pages   the pages of docs/ that run, on the real reference models
# make coverage  the same with coverage, and lint: what CI runs
# make lint    ruff and mypy
# make check-gpu  all that only a GPU can show, in five minutes, with the machine's own python3; PART="speed eager": parts
# make clean   remove what these made, .venv included
#
# Needs Python >= 3.10 with pip, and make. `make PYTHON=python3.12 test` chooses the interpreter that .venv is made with,
# `make WORKERS=1 test` how many processes run the tests.

PYTHON ?= python3
WORKERS ?= 2
PACKAGES := sg_export sg_engines sg_runtime sg_calibration
SOURCES := $(shell find sg_export engines runtime calibration -name '*.py' -o -name '*.safetensors' -o -name '*.json')
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
BUNDLE := demo/scenes-bundle
PICTURES := demo/scenes.png
# The strong branch is as sparse as in training.
BUILD := $(BIN)/sg-export build scenes --strong-sparsity 0.5 --sparsity 0.9 --force

.DELETE_ON_ERROR:
.PHONY: help demo report wheel check test pages coverage lint check-gpu clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(PICTURES)
	@echo "Pictures of six prompts by each guidance: $(CURDIR)/$(PICTURES)"
	@echo "The bundle they came from: $(CURDIR)/$(BUNDLE)"

report: demo/report.html
	@echo "FP32, FP16 and INT8 side by side: $(CURDIR)/demo/report.html"

wheel: $(VENV)/made
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

check: $(VENV)/installed-dev
	$(PYTEST) -m "not gpu and not slow"

test: $(VENV)/installed-dev
	$(PYTEST) -m "not gpu"

pages: $(VENV)/installed-dev
	SG_EXPORT_REAL_PAGES=1 $(PYTEST) tests/test_docs.py

coverage: lint
	$(PYTEST) -m "not gpu" --cov --cov-report=
	@for package in $(PACKAGES); do \
	    echo "coverage $$package: $$($(BIN)/python -m coverage report --format=total --include="*/$$package/*") %"; \
	done

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# PyTorch with CUDA and onnxruntime-gpu are not in constraints.txt, so this does not use .venv.
check-gpu:
	$(PYTHON) -m benchmarks.gpu $(PART)

clean:
	rm -rf $(VENV) .triton demo dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PICTURES): $(BUNDLE)/manifest.json examples/show_scenes.py
	$(BIN)/python -m examples.show_scenes $(BUNDLE) -o $@

$(BUNDLE)/manifest.json: $(SOURCES) | $(VENV)/installed-demo
	mkdir -p demo
	$(BUILD) -o $(BUNDLE)

demo/report.html: $(BUNDLE)/manifest.json demo/scenes-fp16/manifest.json demo/scenes-int8/manifest.json
	$(BIN)/sg-export report $(dir $^) -o $@

demo/report.png: demo/report.html
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1000,1195 \
	    --screenshot=$(CURDIR)/$@ file://$(CURDIR)/demo/report.html

demo/scenes-%/manifest.json: $(SOURCES) | $(VENV)/installed-demo
	mkdir -p demo
	$(BUILD) --precision $* $(if $(filter int8,$*),--prompts examples/scenes-prompts.txt) -o $(@D)

$(VENV)/installed-demo: $(VENV)/made pyproject.toml constraints.txt
	$(PIP) -e '.[diffusers,export,ort,text]'
	touch $@

# Not with constraints.txt: the server needs NumPy 1. Without .triton the tests of a real tritonserver skip.
$(VENV)/installed-dev: $(VENV)/made pyproject.toml constraints.txt tests/triton.txt
	$(PIP) -e '.[dev]'
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .triton -r tests/triton.txt
	touch $@

# Debian's Python has venv but not always ensurepip; its pip can then install itself into the environment.
$(VENV)/made:
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 10) else "sg-export needs Python 3.10 or newer, found " + v + ": try make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV) || { \
	    $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	    $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	touch $@
