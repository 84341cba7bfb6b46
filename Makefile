# Everything runs from .venv, which the first command that needs it installs from requirements.lock.

# Any Python from 3.11 on will do: make PYTHON=python3.12 test
PYTHON ?= $(shell python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)

# The matrices are small: more threads than one cost more than they bring, and sums depend on their number.
export OMP_NUM_THREADS := 1
# No Flower process calls home.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

bin := .venv/bin
pip := $(bin)/python -m pip --disable-pip-version-check -qq
installed := .venv/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test soak verify lint format bench lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

install: $(installed) ## install everything into .venv (the other commands do it when needed)

demo: $(installed) ## train on real loans under differential privacy, and judge on banks never seen
	@$(bin)/metarisk-simulate demo

test: $(installed) ## run the tests; make test ARGS='-k ledger' runs some of them
	@$(bin)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(installed) ## faults in real processes, and twenty banks for twenty rounds: a quarter of an hour
	@$(bin)/pytest -m soak -rP $(ARGS)

verify: $(installed) ## learn the published sinusoids and hold the errors to the known ones
	@$(bin)/metarisk-simulate verify

lint: $(installed) ## check style, types and the rules of imports
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/mypy
	@$(bin)/lint-imports

format: $(installed) ## put every file into the house's style
	@$(bin)/ruff format .
	@$(bin)/ruff check --fix .

bench: $(installed) ## measure what a round costs on this machine
	@$(bin)/metarisk-simulate bench

# The stamp goes first and comes back last: where it is missing, the installation is new or was interrupted, and starts
# from nothing; where only the lock or pyproject.toml changed, what is there is brought up to date.
$(installed): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "metarisk needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing into .venv with $$($(PYTHON) --version); two or three minutes the first time"
	@if [ -e $@ ]; then rm $@; else $(PYTHON) -m venv --clear .venv; fi
	@echo "  1/3 Torch, the largest package"
	@$(pip) install --constraint requirements.lock torch
	@echo "  2/3 the other packages of requirements.lock, $$(grep -c == requirements.lock) in all"
	@$(pip) install --requirement requirements.lock
	@echo "  3/3 metarisk"
	@$(pip) install --no-deps --no-build-isolation --editable .
	@touch $@

# Resolves anew from pyproject.toml, in an environment of its own. A build's own suffix (torch's +cpu) is dropped:
# which build of that version a machine takes is its own matter.
lock: ## resolve every dependency anew and write requirements.lock
	@rm -rf build/lock && $(PYTHON) -m venv build/lock/venv
	@build/lock/venv/bin/python -m pip --disable-pip-version-check -q install setuptools -e '.[sim,ray,postgres,dev]'
	@build/lock/venv/bin/python -m pip check
	@{ sed -n '/^#/p;/^#/!q' requirements.lock; \
		build/lock/venv/bin/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+[a-z0-9.]*$$//'; \
	} > build/lock/requirements.lock
	@mv build/lock/requirements.lock requirements.lock
	@rm -rf build/lock

clean: ## remove .venv, caches, build leftovers and runs/
	@rm -rf .venv build dist runs *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
