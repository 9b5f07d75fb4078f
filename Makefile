# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
# Both make the virtual environment first and reuse it while pyproject.toml is unchanged.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types bench clean

demo: $(INSTALLED)
	$(BIN)/maskloss demo

# One thread per process: two test processes with two threads each would fight for two cores.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# About twenty minutes on two cores, best with nothing else running.
BENCHMARKS := mask_tail masks mask_fidelity matching roi_path inference_tail profile_step
bench: $(INSTALLED)
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/table.py

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[train,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
