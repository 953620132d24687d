# Everything starts here: `make demo` and `make test` need only Python >= 3.11, make and a package registry.
#
#   make demo      install, then pre-train and evaluate a small EVA on real photographs (about 9 minutes on 2 cores)
#   make test      install, then run all tests            (make test PYTEST_ARGS="-k masking")
#   make lint      ruff, mypy, import-linter              make format   apply ruff's formatting and fixes
#   make install   only install, with all developer tools
#   make clean     remove caches and build output         make distclean   and .venv; `runs/` is never touched
#
# Variables: PYTHON (which interpreter), VENV (where to install), TEST_WORKERS, PYTEST_ARGS, DEMO_ARGS.

PYTHON ?= python3
VENV ?= .venv
TEST_WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
DEMO_STAMP := $(VENV)/.installed-demo
DEV_STAMP := $(VENV)/.installed-dev
CODE := src tests benchmarks

.DEFAULT_GOAL := help
.PHONY: help demo test lint format install clean distclean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(DEMO_STAMP)
	$(BIN)/openeva demo $(DEMO_ARGS)

test: $(DEV_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

install: $(DEV_STAMP)

# A stamp is older than these files exactly when something must be installed again. What is there already stays: `dev`
# holds `demo`, so that one target never takes away what another one needs.
$(DEMO_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(call install,demo)
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(call install,dev)
	@touch $(DEMO_STAMP) $@

# With uv where it is there (it may be a shim that does not work here, so it is run once), else with pip.
define install
@if uv --version >/dev/null 2>&1; then \
	echo "installing openeva[$(1)] into $(VENV) with uv"; \
	uv pip install --python $(BIN)/python -c constraints.txt -e '.[$(1)]'; \
else \
	echo "installing openeva[$(1)] into $(VENV) with pip"; \
	{ $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade || { \
		echo "error: this Python comes without pip; install uv, or the system's package python3-venv" >&2; exit 2; }; } && \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(1)]'; \
fi
endef

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: $(PYTHON) not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: openeva needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
			"name another one: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv --without-pip $(VENV)

clean:
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
