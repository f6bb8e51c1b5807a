# `make demo` and `make test` are all that a newcomer needs; both first make .venv from python3 and pip.
PYTHON ?= python3
# Where to get torch, if not from the index that pip already knows: for a CPU build from PyTorch's own index say
# `make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu`.
TORCH_INDEX ?=
OUT ?= runs/demo
ARGS ?=
# Processes that the tests run in; each takes one thread and up to 3 GB.
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test check format bench docs train setup clean

demo: $(STAMP)
	$(BIN)/overpaint demo --out $(OUT) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not gpu" $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tests/check_style.py
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	for script in benchmarks/speed_*.py benchmarks/quality_*.py; do \
	  $(BIN)/python $$script --quick $(ARGS) || exit 1; \
	done

# The site goes to build/site; a broken link or a name without a page fails. Needs no network.
docs: $(STAMP)
	$(BIN)/mkdocs build --strict $(ARGS)

# make train MODEL=icons ARGS="--minutes 150 --resume"
MODEL ?= icons
train: $(STAMP)
	$(BIN)/overpaint train $(MODEL) $(ARGS)

setup: $(STAMP)

# torch goes first and alone, so that no dependency pulls in a CUDA build. open-clip-torch goes without its dependencies,
# which are torchvision and more: the tests read CLIP's vocabulary from it and import nothing.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	$(PIP) install --quiet -c constraints.txt --no-deps open-clip-torch
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache runs
