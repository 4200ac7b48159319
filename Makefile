# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` set up .venv themselves; nothing else has to be installed first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: cards demo test test-slow test-host test-all coverage check style docs build benchmark clean

# torch first and pinned: an unpinned one pulls gigabytes of CUDA packages, also into pip's build environments
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,eval]'
	touch $@

demo: .venv/installed ## calibrate, quantize and compare the demo model; writes demo_output/
	$(BIN)/diffusers-dq demo

test: .venv/installed ## the suite, but for what takes minutes
	$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: .venv/installed ## what takes minutes: quality on trained weights, packages, examples as processes
	$(BIN)/python -m pytest -n auto -m slow

test-host: .venv/installed ## diffusers' own tests of quantizers on ours: fetched at one commit, from DIFFUSERS_TESTS if set
	$(BIN)/python tests/host/run.py -n auto

test-all: test test-slow test-host ## all there is: the suite, diffusers' own, 10,000 fuzzed files, kernels compiled ahead in all their forms
	DQ_FUZZ_CASES=10000 $(BIN)/python -m pytest -n auto tests/faults/test_fuzzed_files.py
	DIFFUSERS_DQ_THOROUGH=1 $(BIN)/python -m pytest -n auto tests/kernels/test_compile_ahead.py

coverage: .venv/installed ## lines and branches that the tests reach, 90 percent at least; TESTS=path for some of them
	$(BIN)/python -m pytest -n auto --cov --cov-report=term-missing:skip-covered $(if $(TESTS),--cov-fail-under=0) $(TESTS)

check: .venv/installed ## what a commit must pass: lint, types, import contracts, tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n auto -m "not slow"

style: .venv/installed ## reformat
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: .venv/installed ## the site in site/, with an error for a broken link; its tables from the code
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

cards: .venv/installed ## the demo models' cards, measured anew: hub_cards/ with its pictures
	$(BIN)/python hub_cards/generate.py --measure

build: .venv/installed ## wheel and source distribution in dist/, the wheel built from the latter
	rm -rf dist
	$(BIN)/python -m build

benchmark: .venv/installed ## int8 against floating point and the peers on this machine; kernels/README.md from the results
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[benchmark]'
	$(BIN)/diffusers-dq benchmark all --overwrite
	$(BIN)/diffusers-dq benchmark report

clean:
	rm -rf .venv build dist site demo_output .coverage* *.egg-info
