# make repro    environment, pipeline, table of the runs          make test     what tests need more, linters, tests
# make check    are params.yaml and dvc.yaml sound?               make choose   a whole experiment; NAME=imagenet IMAGES=/data
# make compare  the runs; EXPS="main mine": two experiments       make bench    ratios against the obvious ways; BENCH=--quick
# make lock     requirements*.in -> requirements*.txt
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := repro
.PHONY: repro test check choose compare lock bench env

# The first Python of 3.11 or later; say `make PYTHON=/path/to/python` for another.
PYTHON ?= $(firstword $(foreach name,python3.13 python3.12 python3.11 python3 python,$(shell \
	$(name) -c 'import sys; sys.version_info >= (3, 11) and print(sys.executable)' 2>/dev/null)))
# The environment comes first in PATH, as if activated: `python` in dvc.yaml is its own, in queued experiments too.
export VIRTUAL_ENV := $(CURDIR)/.venv
export PATH := $(VIRTUAL_ENV)/bin:$(PATH)
export PYTHONUNBUFFERED := 1
unexport PYTHONHOME PYTHONPATH
# Every stage is a process of its own: with imports compiled once instead of each time it starts in half the time.
unexport PYTHONDONTWRITEBYTECODE
# uv knows nothing of an index that pip is configured with.
INSTALL = index="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$(python -m pip config get global.index-url 2>/dev/null || true)}}"; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; uv pip install --quiet --compile-bytecode
LOCK = uv pip compile --quiet --universal --fork-strategy fewest --generate-hashes --python-version 3.11 \
	--no-emit-index-url --no-header

repro: env
	@python -m regvit.pipeline.reproduce

test: .venv/.tests
	@ruff check .
	@ruff format --check .
	@lint-imports --no-logo
	@python -m pytest -n 2 --dist loadfile --no-loadscope-reorder  # by file, longest first: a built pipeline is built once

check: env
	@python -m regvit.pipeline.params

choose: env  # make choose NAME=imagenet IMAGES=/data/images; without NAME: what there is
	@python -m regvit.pipeline.choose $(if $(NAME),$(NAME) $(if $(IMAGES),--images "$(IMAGES)"),--list)

compare: env
	@python -m regvit.pipeline.compare_runs $(EXPS)

bench: env
	@python -m benchmarks $(BENCH)

lock: env
	$(LOCK) requirements.in --output-file requirements.txt
	$(LOCK) -c requirements.txt requirements-test.in --output-file requirements-test.txt

env: .venv/.complete

.venv/.complete: requirements.txt pyproject.toml regvit/pipeline/plots_template.py
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: no Python 3.11 or later was found; install one, or say make PYTHON=/path/to/python" >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"make: $(PYTHON) is Python {sys.version.split()[0]}, 3.11 or later is needed")'
	@start=$$SECONDS; \
	echo "environment: $(PYTHON) -> .venv"; \
	[ -x .venv/bin/python ] || "$(PYTHON)" -m venv .venv; \
	awk '/^[^ #]/ {uv = /^uv==/} uv' requirements.txt > .venv/uv.txt; \
	python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt; \
	$(INSTALL) --require-hashes -r requirements.txt; \
	uv pip install --quiet --no-deps --no-build-isolation --editable .; \
	python -m regvit.pipeline.plots_template; \
	touch $@; \
	echo "environment: ready after $$((SECONDS - start)) s"

.venv/.tests: requirements-test.txt .venv/.complete
	@$(INSTALL) --require-hashes -r requirements-test.txt; touch $@
