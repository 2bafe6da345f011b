# One environment, made on first use from pinned versions; every target that needs it makes it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VENV := .venv
RUN := $(VENV)/bin/python
LOWEST := .venv-lowest
OUT := out/demo
PYTEST_WORKERS ?= 2
# tests/conftest.py says which tests share a worker and which come first.
WORKERS = -n $(PYTEST_WORKERS) --no-loadscope-reorder
PYTEST_ARGS ?=

# The stamp's name holds the hash of what is installed: new pins make a new environment, nothing else does.
hash = $(shell cat $(1) | sha256sum | cut -c1-16)
STAMP := $(VENV)/.installed-$(call hash,requirements/dev.txt)
COMPILERS := .compilers
COMPILERS_STAMP := $(COMPILERS)/.installed-$(call hash,requirements/compilers.txt)
export KERNELS_PALLAS_COMPILERS := $(CURDIR)/$(COMPILERS)
LOWEST_STAMP := $(LOWEST)/.installed-$(call hash,requirements/lowest.txt)

# python3.11 if there is one, else any python3 that is new enough; with the venv module, which Debian packages apart.
define find_python
python=""; \
for candidate in python3.11 python3 python3.12 python3.13; do \
  if command -v $$candidate >/dev/null && $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then python=$$candidate; break; fi; \
done; \
if [ -z "$$python" ]; then echo "Python 3.11 or newer is needed and was not found: apt-get install python3 python3-venv" >&2; exit 1; fi; \
if ! $$python -c 'import venv, ensurepip' 2>/dev/null; then echo "$$python has no venv module: apt-get install python3-venv" >&2; exit 1; fi
endef

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##\s*/\t/' | expand -t 16

.PHONY: venv
venv: $(STAMP)  ## make the environment in .venv

$(STAMP):
	@$(find_python); \
	echo "making $(VENV) with $$($$python --version): pinned packages, a few minutes the first time"; \
	$$python -m venv --clear $(VENV)
	@echo "installing requirements/dev.txt"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
	@echo "$(VENV) is ready"

.PHONY: demo
demo: $(STAMP)  ## run the optimizer experiments on two cores and write a report (about 5 minutes)
	$(RUN) -m experiments run exadam lion lion_search accelat --preset quick --out $(OUT)
	$(RUN) -m experiments report --out $(OUT)

.PHONY: compilers
compilers: $(COMPILERS_STAMP)  ## install the TPU and GPU compilers that prove kernels, in .compilers (1.1 GB, no chip needed)

$(COMPILERS_STAMP): | $(STAMP)
	@echo "installing requirements/compilers.txt into $(COMPILERS)"
	@rm -rf $(COMPILERS)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps --require-hashes --target $(COMPILERS) -r requirements/compilers.txt
	@touch $@

.PHONY: prove
prove: $(COMPILERS_STAMP)  ## compile every Pallas kernel with the real TPU and GPU compilers and print what it needs and costs
	$(RUN) -m kernels_pallas.prove --compare all

.PHONY: test
test: $(STAMP) $(COMPILERS_STAMP)  ## run the whole test suite
	@echo "running the tests with $(PYTEST_WORKERS) workers"
	$(RUN) -m pytest $(WORKERS) $(PYTEST_ARGS)

.PHONY: lint
lint: $(STAMP)  ## check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

.PHONY: docs
docs: $(STAMP)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "documentation: $(CURDIR)/site/index.html"

.PHONY: bench
bench: $(STAMP)  ## print speed ratios, measured in turn in one process
	$(RUN) -m experiments bench

.PHONY: test-lowest
test-lowest: $(LOWEST_STAMP)  ## test the library with the oldest versions that pyproject.toml allows
	# Every public function's example; then what old versions break first: gradients, meshes, Pallas, checkpoints.
	$(LOWEST)/bin/python -m pytest $(WORKERS) jaxaccel kernels_pallas tests/optim tests/test_records.py tests/models/test_decoder.py \
	  $(wildcard tests/kernels_pallas/*/test_kernels.py tests/kernels_pallas/*/test_xla.py tests/kernels_pallas/*/test_composition.py) \
	  tests/kernels_pallas/lm_head_confidence tests/kernels_pallas/node_histogram
	$(LOWEST)/bin/python -m pytest $(WORKERS) -k "shard or device or mesh or vmap" \
	  tests/attention tests/boosting tests/caching tests/compression tests/decoding tests/forecasting tests/moe tests/posttraining tests/robustness

$(LOWEST_STAMP):
	@$(find_python); \
	echo "making $(LOWEST) with $$($$python --version): the oldest versions that pyproject.toml allows"; \
	$$python -m venv --clear $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/lowest.txt
	@touch $@

.PHONY: lock
lock: $(STAMP)  ## pin again what pyproject.toml asks for, into requirements/dev.txt and constraints.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check pip-tools
	$(RUN) requirements/lock.py

.PHONY: clean
clean:  ## remove environments, caches and build outputs (not out/, which holds your results)
	rm -rf $(VENV) $(LOWEST) $(COMPILERS) site build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
