# make train   train the default job, real handwritten digits, on whatever device is here
# make generate   train a generator on the same digits, and sample from it
# make test    run the test suite; make test-all: 500 more combinations of what the kernels can be asked for
# Both make .venv first when it is missing, and need nothing else than Python 3.12 or 3.13.

VENV := .venv
CONFIG := configs/classifier.py:digits
WORKDIR := runs/digits
GENERATOR := runs/digits_generator
WORKERS := 2
ARGS :=
PYTHON = "$(VENV)/bin/python"

.PHONY: help train generate test test-all venv lint lock clean

help:
	@echo "make train   train GSPN on $(CONFIG), into $(WORKDIR)"
	@echo "             more flags: make train ARGS='--config.steps=200', CONFIG=..., WORKDIR=..."
	@echo "make generate   train a generator of digits into $(GENERATOR), sample from it, and score the images by $(WORKDIR)"
	@echo "make test    run the test suite in $(WORKERS) processes; a part of it: make test ARGS='tests/data -x'"
	@echo "make test-all  the same with 500 more combinations for the kernels, drawn from all: TEST_SEED=1 draws others"
	@echo "make lint    ruff and pyright"
	@echo "make lock    compile requirements.lock and requirements-gpu.lock again (needs uv)"
	@echo "make clean   remove caches and build products; keeps $(VENV) and runs"

venv:
	@.ci/venv "$(VENV)"

train: venv
	@echo "Training $(CONFIG) into $(WORKDIR)."
	@$(PYTHON) -m experiments.train --config=$(CONFIG) --workdir="$(WORKDIR)" $(ARGS)

generate: venv
	@echo "Training a generator of digits into $(GENERATOR), and sampling from it."
	@$(PYTHON) -m experiments.train --config=configs/generator.py:digits --workdir="$(GENERATOR)" $(ARGS)
	@$(PYTHON) -m experiments.sample --workdir="$(GENERATOR)" --guidance=2 --count=500 \
		--output="$(GENERATOR)/samples.png" --npz="$(GENERATOR)/samples.npz"
	@if [ -d "$(WORKDIR)/checkpoints" ]; \
	then $(PYTHON) -m experiments.score --images="$(GENERATOR)/samples.npz" --classifier="$(WORKDIR)"; \
	else echo "To have the images scored: make train, then make generate again, which draws nothing twice."; fi

test: venv
	@echo "Running the tests in $(WORKERS) processes."
	@$(PYTHON) -m pytest -n $(WORKERS) --dist=worksteal $(ARGS)

test-all: venv
	@echo "Running all tests, with more combinations for the kernels, in $(WORKERS) processes."
	@$(PYTHON) -m pytest -n $(WORKERS) --dist=worksteal -m "full or not full" $(ARGS)

lint: venv
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PYTHON) -m pyright --pythonpath $(PYTHON)

LOCK = uv pip compile --universal --python-version 3.12 --generate-hashes --no-annotate --no-header --quiet
IN_BOTH := jax jaxlib ml-dtypes numpy opt-einsum scipy

# requirements-gpu.lock holds what a GPU needs on top of requirements.lock.
lock:
	$(LOCK) --output-file requirements.lock requirements.txt requirements-dev.txt
	$(LOCK) --output-file requirements-gpu.lock --constraints requirements.lock \
		$(addprefix --no-emit-package ,$(IN_BOTH)) requirements-gpu.txt

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
