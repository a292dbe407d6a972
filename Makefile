# `make demo` and `make test` do all the set-up themselves on a machine that has only Python 3.11+ and make.
VENV := .venv
BIN := $(VENV)/bin
# The first Python that runs and is new enough; a version manager may offer names that do not.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
SOURCES := lib jobs tests
# A process that died is not replaced: pytest-xdist 3.8 waits for ever for the new one. tests/run_pytest.py goes on.
TWO_FILES := -n 2 --dist loadfile --max-worker-restart 0 --durations 25

.PHONY: help setup demo test check format integration chaos gpu bench lock clean

help:  ## Show this help.
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## Make .venv with the pinned dependencies and Convoy itself.

$(VENV)/.ready: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Convoy needs Python 3.11 or newer: install it, or call make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup  ## Run the main job on real images: local Ray, local folder, no cloud. Three to eight minutes on two cores.
	$(BIN)/python jobs/demo.py

# In turn, as a process that has every library of the unit tests loaded is no place to start and stop clusters in; of
# each kind two files at a time.
test: setup  ## Run all tests that need no special machine.
	$(BIN)/python tests/run_pytest.py tests/unit -m "not slow and not gpu" $(TWO_FILES)
	$(BIN)/python tests/run_pytest.py tests/contract tests/integration tests/chaos -m "not slow and not gpu" $(TWO_FILES)

check: setup  ## Lint, format, strict types, and the floors.
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_floors.py

format: setup  ## Format the code.
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

integration: setup  ## Only the tests that start a real Ray or a real S3 server.
	$(BIN)/python tests/run_pytest.py tests/contract tests/integration -m "not gpu"

chaos: setup  ## Kill and spoil things on purpose, the long form; ends in a table of faults. About an hour.
	$(BIN)/python tests/run_pytest.py tests/unit/vision/test_forward.py tests/unit/cluster/test_library_versions.py \
		tests/unit/cluster/test_training_loop.py \
		tests/unit/storage/test_s3_store.py tests/unit/storage/test_samples.py tests/unit/storage/test_sources_*.py \
		-m "not gpu" $(TWO_FILES)
	$(BIN)/python tests/run_pytest.py tests/contract/test_leases.py tests/contract/test_s3_faults.py \
		tests/contract/test_conditional_put_faults.py tests/integration/test_awkward_images.py \
		tests/integration/test_cache_on_s3.py tests/integration/test_runs.py tests/integration/test_slice_workers.py \
		tests/integration/test_cache.py::test_an_unfinished_run_of_a_former_version_is_ended_before_the_rest_is_computed \
		tests/integration/test_retrain.py::test_days_of_digits_end_as_they_should tests/chaos \
		-m "not gpu" $(TWO_FILES)

gpu: setup  ## The tests that need a CUDA device.
	$(BIN)/python -m pytest tests/gpu -m gpu

bench: setup  ## Measure against the physical bounds and the usual ways, in one run.
	$(BIN)/convoy bench cache

lock: setup  ## Renew requirements.lock for Python 3.11 to 3.13; needs uv.
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" -o requirements.lock

clean:  ## Remove what setup and demo made.
	rm -rf $(VENV) demo-workspace
