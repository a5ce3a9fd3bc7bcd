# make repro   environment, pipeline, table           make test   environment, linter, tests
# make check   are params.yaml and dvc.yaml sound?    make lock   requirements.in -> requirements.txt
# make choose  a whole experiment: data sets, backbones, runs
# make compare      the table of the runs; EXPS="a b c": experiments or commits against the first, paired intervals, picture
# make experiments  the experiments with what was changed and the figures that differ
# make audit, coverage, mutation   known vulnerabilities, share of the code that tests run, tests against a wrong module
# make bench        ratios against the obvious ways; BENCH=--quick only tries whether all runs
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := repro

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

.PHONY: repro test check choose compare experiments bench audit coverage mutation lock env
repro: env
	@python -m regvit.pipeline.reproduce

test: env
	@ruff check .
	@ruff format --check .
	@python -m pytest -n 2 --dist loadfile  # by file: test_caching.py builds its pipeline once

check: env
	@python -m regvit.pipeline.params

choose: env  # make choose NAME=imagenet IMAGES=/data/images; without NAME: what there is
	@python -m regvit.pipeline.choose $(if $(NAME),$(NAME) $(if $(IMAGES),--images "$(IMAGES)"),--list)

compare: env
	@python stages/$(if $(EXPS),experiments.py compare $(EXPS),compare.py)

experiments: env
	@python -m regvit.pipeline.experiment_commands show

audit: env  # known vulnerabilities of what is pinned; says so where no database can be reached
	@python tests/audit.py

coverage: env  # of lines and branches, by the tests and all that they start; fails under 90 %
	@coverage erase
	@coverage run -m pytest -q
	@coverage combine --quiet
	@coverage report

mutation: env  # make mutation MODULE=metrics [MOST=100]: do the tests notice if the module is wrong?
	@python tests/mutation.py $(MODULE) $(if $(MOST),--most $(MOST))

bench: env
	@python -m benchmarks $(BENCH)

env: .venv/.complete

.venv/.complete: requirements.txt pyproject.toml regvit/pipeline/plots_template.py regvit/pipeline/plot_charts.py
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: no Python 3.11 or later was found; install one, or say make PYTHON=/path/to/python" >&2; exit 1; fi
	@start=$$SECONDS; \
	echo "environment: $(PYTHON) -> .venv"; \
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"make: $(PYTHON) is Python {sys.version.split()[0]}, 3.11 or later is needed")'; \
	[ -x .venv/bin/python ] || "$(PYTHON)" -m venv .venv; \
	awk '/^[^ #]/ {uv = /^uv==/} uv' requirements.txt > .venv/uv.txt; \
	python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt; \
	index="$$(python -m pip config get global.index-url 2>/dev/null || true)"; \
	index="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$index}}"; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
	uv pip install --quiet --compile-bytecode --require-hashes -r requirements.txt; \
	uv pip install --quiet --no-deps --no-build-isolation --editable .; \
	python -m regvit.pipeline.plots_template; \
	touch $@; \
	echo "environment: ready after $$((SECONDS - start)) s"

lock: env
	uv pip compile --quiet --universal --fork-strategy fewest --generate-hashes --python-version 3.11 \
		--no-emit-index-url --no-header requirements.in --output-file requirements.txt
