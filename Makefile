PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: demo test lint format clean help

demo: $(READY) ## Patch, finetune, evaluate and report on the bundled checkpoint, offline
	@$(BIN)/hf-sparse demo

test: lint ## Everything CI runs: lint, then the tests
	$(BIN)/pytest -n auto --maxprocesses 4

lint: $(READY) ## Check formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove caches and build products (keeps .venv and your runs)
	rm -rf build dist *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
	find hf_sparse patches finetune tests -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Without build isolation the pinned setuptools builds the package; an isolated build would fetch the newest one.
# The stamp is written last, so an interrupted install starts over.
$(READY): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "==> creating .venv"; $(PYTHON) -m venv --clear .venv; }
	@echo "==> installing hf-sparse and what it needs into .venv (minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
