# make demo    fine-tune a small model on this machine, from nothing, and show before and after
# make test    install what the tests need, run linter and tests, and print the 25 slowest tests
# make lint    linter and formatter only
# make test-all  sweeps too: every combination, long runs, and other versions of other libraries; more than an hour
# make docs    the documentation as a site, in build/site
# make clean   remove what was built here (demo/, caches, .venv); runs/ stays
#
# PYTHON chooses the interpreter (3.11 or newer): make test PYTHON=python3.12

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder --durations=25
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

.PHONY: demo test test-all lint docs install install-test clean

demo: install
	$(VENV)/bin/python -m ftjax demo

test: lint
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-all: lint
	FTJAX_TEST_ALL=1 $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: install-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; name it with PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.created
	@echo "installing ftjax into $(VENV)"
	$(PIP) --editable .
	@touch $@

# torch is the oracle of the tests and nothing else. It goes in first and exactly, so that no other package picks a build.
$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing the test extra into $(VENV)"
	$(PIP) $(TORCH)
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "installing the docs extra into $(VENV)"
	$(PIP) --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) demo build dist .cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
