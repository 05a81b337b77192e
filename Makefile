.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= --constraint constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(CONSTRAINTS)
# every value is given, so that a configuration made for another machine changes nothing here
# threads that wait spin shortly, then sleep: where other programs want the cores too, a step is five times faster so
LAUNCH := GOMP_SPINCOUNT=10000 $(BIN)/python -m accelerate.commands.launch --quiet --cpu --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no --num_cpu_threads_per_process $$($(PYTHON) -c 'import os; print(os.cpu_count())')
OUTPUT_DIR ?=
MINUTES ?=
MODEL ?= $(or $(IFLAME_MODEL),models/iflame-artist)
WORKERS ?= 2
PYTEST_ARGS ?=

.PHONY: help
help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/ready-demo ## generate 16 meshes with the released model, complete a part, and draw them to outputs/demo
	$(BIN)/python -m iflame_cli.demo --model "$(MODEL)" --out "$(or $(OUTPUT_DIR),outputs/demo)"

.PHONY: train-demo
train-demo: $(VENV)/ready-train ## train a small model on the CPU, with 16 meshes, to outputs/train-demo (MINUTES=20 trains longer, or goes on)
	$(LAUNCH) training/train.py training/configs/demo.yaml --output_dir $(or $(OUTPUT_DIR),outputs/train-demo) $(if $(MINUTES),--max_minutes $(MINUTES))
	@echo "Look at samples.png and at the glb files in $(or $(OUTPUT_DIR),outputs/train-demo)."

.PHONY: app
app: $(VENV)/ready-app ## show a page that generates meshes (MODEL=folder chooses another model than the released one)
	$(BIN)/python app/app.py --model "$(MODEL)"

.PHONY: test
test: $(VENV)/ready-test ## run the tests with two workers (PYTEST_ARGS="-k name" chooses)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

.PHONY: test-newest
test-newest: ## run the tests in a fresh environment with the newest releases of everything but torch
	rm -rf $(VENV)-newest
	$(MAKE) test VENV=$(VENV)-newest CONSTRAINTS=

.PHONY: check-newest
check-newest: $(VENV)/ready-test ## load, generate, train, save with the newest release of transformers: minutes, not the whole suite
	$(BIN)/python tests/versions.py --newest --python $(BIN)/python

.PHONY: quality
quality: $(VENV)/ready-quality ## check formatting and style without changing a file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

.PHONY: style
style: $(VENV)/ready-quality ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: clean
clean: ## remove the virtual environment, outputs, builds and caches
	rm -rf $(VENV) $(VENV)-newest outputs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is made after its installation succeeded, and is older than the files that decide what is installed.

$(VENV)/ready-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/ready-quality: $(VENV)/ready-python constraints.txt
	$(PIP) ruff
	@touch $@

# torch first and by itself, so that a build already chosen for this machine (CPU or CUDA) is the one the others find
$(VENV)/ready-torch: $(VENV)/ready-python constraints.txt
	@echo "Installing PyTorch into $(VENV): a minute or more, once."
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/ready-demo $(VENV)/ready-train $(VENV)/ready-test $(VENV)/ready-app: $(VENV)/ready-%: $(VENV)/ready-torch setup.cfg pyproject.toml constraints.txt
	@echo "Installing what 'make $(subst train,train-demo,$*)' needs into $(VENV)."
	$(PIP) --editable '.[$*]'
	@touch $@
