# make           show the commands
# make train     train a small GSPN on real handwritten digits, on the device of this machine
# make generate  train a generator of the same digits, and draw some
# make test      run the tests
# Each makes .venv first if it is missing. They need Python 3.12 or 3.13 and nothing else.

VENV := .venv
GPU ?= auto
CONFIG := configs/classifier.py:digits
WORKDIR := runs/digits
GENERATOR := runs/digits_generator
WORKERS := 2
ARGS :=
PYTHON = "$(VENV)/bin/python"
PYTEST = $(PYTHON) -m pytest -n $(WORKERS) --dist=worksteal

.PHONY: help train generate test test-all test-random venv lint lock clean

help:
	@echo "make train        train $(CONFIG) into $(WORKDIR)"
	@echo "                  more flags: make train ARGS='--config.steps=200'; CONFIG=... and WORKDIR=... name others"
	@echo "make generate     train a generator of digits into $(GENERATOR), draw 500 images, and score them with $(WORKDIR)"
	@echo "make test         run the tests in $(WORKERS) processes; some of them: make test ARGS='tests/data -x'"
	@echo "make test-all     run all tests, also the slow ones"
	@echo "make test-random  run kernel tests on random combinations of shapes and options, for hours; TEST_SEED=1 draws others"
	@echo "make venv         make $(VENV); with an NVIDIA driver it holds the GPU packages, GPU=0 leaves them out"
	@echo "make lint         run ruff and pyright"
	@echo "make lock         compile the lock files again (needs uv)"
	@echo "make clean        delete caches and build products, but not $(VENV) and runs"

venv:
	@GPU="$(GPU)" .ci/venv "$(VENV)"

train: venv
	@echo "Training $(CONFIG) into $(WORKDIR)."
	@$(PYTHON) -m experiments.train --config=$(CONFIG) --workdir="$(WORKDIR)" $(ARGS)

generate: venv
	@echo "Training a generator of digits into $(GENERATOR), and drawing from it."
	@$(PYTHON) -m experiments.train --config=configs/generator.py:digits --workdir="$(GENERATOR)" $(ARGS)
	@$(PYTHON) -m experiments.sample --workdir="$(GENERATOR)" --guidance=2 --count=500 \
		--output="$(GENERATOR)/samples.png" --npz="$(GENERATOR)/samples.npz"
	@if [ -d "$(WORKDIR)/checkpoints" ]; \
	then $(PYTHON) -m experiments.score --images="$(GENERATOR)/samples.npz" --classifier="$(WORKDIR)"; \
	else echo "To score the images: make train, then make generate again. The images are kept, not drawn again."; fi

test: venv
	@echo "Running the tests in $(WORKERS) processes."
	@$(PYTEST) $(ARGS)

test-all: venv
	@echo "Running all tests in $(WORKERS) processes."
	@$(PYTEST) -m "not random" $(ARGS)

test-random: venv
	@echo "Running kernel tests on randomly drawn combinations in $(WORKERS) processes."
	@$(PYTEST) -m random $(ARGS)

lint: venv
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PYTHON) -m pyright --pythonpath $(PYTHON)

LOCK = uv pip compile --universal --python-version 3.12 --generate-hashes --no-annotate --no-header --quiet
IN_BOTH := jax jaxlib ml-dtypes numpy opt-einsum scipy

# requirements-gpu.lock holds the packages that a GPU needs on top of requirements.lock.
lock:
	$(LOCK) --output-file requirements.lock requirements.txt requirements-dev.txt
	$(LOCK) --output-file requirements-gpu.lock --constraints requirements.lock \
		$(addprefix --no-emit-package ,$(IN_BOTH)) requirements-gpu.txt

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
