# Two commands for a fresh machine with Python 3.11+, git and make:
#   make demo    set up and run the main job        make test    set up and run the tests
# Everything is installed into .venv; versions are pinned in constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test setup lint format types check docs starter bench-engine bench-gateway node-client clean

setup: $(STAMP)

# PyTorch first and alone: a range would let pip choose a build with several gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cloudlm needs Python 3.11 or newer; set PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing dependencies into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[engine,postgres,dev]'
	@touch $@

demo: setup
	@$(BIN)/cloudlm demo

test: setup check
	@$(BIN)/python -m pytest -n 2 --dist loadfile -q

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: setup
	@$(BIN)/python -m docs.generate

starter: setup
	@$(BIN)/python -m starter.train

bench-engine: setup
	@$(BIN)/python bench/engine/run.py

bench-gateway: setup
	@$(BIN)/python bench/gateway/run.py

clean:
	rm -rf $(VENV) out build dist
