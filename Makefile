# Two commands for a fresh machine with Python 3.11+, git and make:
#   make demo    set up and run the main job        make test    set up and run the tests
# Everything is installed into .venv; versions are pinned in constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test setup check format docs starter native fuzz-gateway fuzz-fleet bench-engine bench-engine-peers bench-gateway bench-fleet clean

setup: $(DEV)

# PyTorch first and alone: a range would let pip choose a build with several gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cloudlm needs Python 3.11 or newer; set PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing cloudlm into $(VENV) (a few minutes the first time)"
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[engine]'
	@touch $@

$(DEV): $(STAMP)
	@echo "installing the development tools into $(VENV)"
	@$(PIP) -e '.[engine,postgres,redis,dev]'
	@touch $@

demo: $(STAMP)
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

# The engine's CPU kernels (built on first use otherwise, where a compiler is found), and the path of a
# request through the gateway (minutes; the gateway runs from its sources otherwise).
native: $(STAMP)
	@$(BIN)/python -m cloudlm.engine.native.build
	@$(BIN)/python -m cloudlm.gateway.compiled

# 100,000 malformed requests against the gateway's server; the tests send a few thousand.
fuzz-gateway: setup
	@CLOUDLM_FUZZ=100000 $(BIN)/python -m pytest -q --timeout 900 tests/unit/gateway/test_fuzz.py

# The fleet under random faults in virtual time: SEEDS=10000 for the whole, SEED=17 for one again,
# SCRIPT=file for what a failing seed printed, BUGS=1 plants bugs that must be caught.
SEEDS ?= 1000
fuzz-fleet: setup
	@PYTHONHASHSEED=0 $(BIN)/python -m tests.fuzz --seeds $(SEEDS) $(if $(SEED),--seed $(SEED)) $(if $(SCRIPT),--script $(SCRIPT)) $(if $(BUGS),--bugs)

# Our engine and every peer that is installed, in one run (two hours with all of them); what our
# engine's abilities cost besides. A workload ends after 300 s (run.py --limit).
bench-engine: setup
	@$(BIN)/python bench/engine/run.py --abilities --record

# The peers, each into an environment of its own under .venv-peers (about 10 GB, needs clang-16).
bench-engine-peers: setup
	@$(BIN)/python bench/engine/peers.py

# Latency and throughput beside every peer that is found, the ladder of streams, overload and outage, memory,
# streams whose replica is killed: about half an hour.
bench-gateway: setup
	@mkdir -p out && rm -f out/bench-gateway.jsonl
	@for script in run.py "streams.py --only all" overload.py memory.py resume.py; do \
		$(BIN)/python bench/gateway/$$script >> out/bench-gateway.jsonl || exit 1; done
	@$(BIN)/python bench/gateway/report.py out/bench-gateway.jsonl

# Policies against each other in the simulator: routing, autoscaling, spot; then real processes:
# the simulator against two workers, and changes under load (ONLY=reality or another part alone).
bench-fleet: setup
	@$(BIN)/python bench/fleet/run.py --record $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf $(VENV) out build dist
