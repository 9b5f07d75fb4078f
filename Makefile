# `make demo` trains and evaluates a small model, `make test` runs the linters and all but the slow tests, and
# `make test-all` runs all. Each first creates the virtual environment, and reuses it as long as pyproject.toml is
# unchanged.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What the demo needs, and what the tests need besides.
TRAIN := $(VENV)/.train
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all coverage lint types docs bench clean

demo: $(TRAIN)
	$(BIN)/maskloss demo

# One thread per process, because two test processes with two threads each would compete for two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal
test: lint types
	$(PYTEST) -m "not slow"

# Also the tests of exports, sweeps and notebooks, which take as long as all others.
test-all: lint types
	$(PYTEST)

# Which lines the tests of `make test` run, and an error if they are fewer than nine in ten.
coverage: $(INSTALLED)
	$(PYTEST) -m "not slow" --cov --cov-fail-under=90

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# Writes the documentation site into build/docs, without a network; a warning is an error.
docs: $(INSTALLED)
	$(BIN)/sphinx-build -E -W --keep-going -q docs build/docs

# Takes about half an hour on two cores, ideally with nothing else running. With IMAGES=DIR ANNOTATIONS=FILE, also the
# whole training loop and the evaluation, on these photographs.
BENCHMARKS := mask_tail masks mask_fidelity matching roi_path inference_tail profile_step launches growth
ON_PHOTOGRAPHS := $(if $(IMAGES),loop evaluation)
bench: $(INSTALLED)
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done
	for name in $(ON_PHOTOGRAPHS); do \
	    $(BIN)/python benchmarks/$$name.py --images $(IMAGES) --annotations $(ANNOTATIONS) || exit 1; done
	$(BIN)/python benchmarks/table.py

# Without a GPU, the CPU wheels of torch and torchvision (pytorch.org, "Get started") save 4 GB: install these two in
# the environment first.
$(TRAIN): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test $(INSTALLED) -nt pyproject.toml || $(BIN)/python -m pip install --editable '.[train]'
	touch $@

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[train,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
