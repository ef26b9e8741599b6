PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OLDEST := .venv/oldest

.DEFAULT_GOAL := help
.PHONY: demo test conformance lint format clean help

demo: $(READY) ## Patch, finetune, evaluate and report on the bundled checkpoint, offline
	@$(BIN)/hf-sparse demo

test: lint $(OLDEST)/.ready ## Everything CI runs: lint, then the tests on the newest and on the oldest versions
	$(BIN)/pytest -n auto --maxprocesses 4
	PYTHONPATH=$(OLDEST) $(BIN)/pytest -n auto --maxprocesses 4

conformance: $(READY) ## Every model family x every behaviour: the largest differences as a table
	$(BIN)/pytest -q -n auto --maxprocesses 4 tests/conformance

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
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Without build isolation the pinned setuptools builds the package; an isolated build would fetch the newest one.
# The stamp is written last, so an interrupted install starts over.
$(READY): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "==> creating .venv"; $(PYTHON) -m venv --clear .venv; }
	@echo "==> installing hf-sparse and what it needs into .venv (minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(OLDEST)/.ready: $(READY) constraints-oldest.txt
	@rm -rf $(OLDEST)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(OLDEST) -r constraints-oldest.txt
	@touch $@
