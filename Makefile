# `make demo` and `make test` are all a fresh machine needs. The environment is .venv: the demo installs what it needs,
# the other targets complete it. Another set of extras (`make install EXTRAS=cuda,dev`) or interpreter
# (`PYTHON=python3.12`) can be named, see scripts/install.sh.

BIN := .venv/bin
RECIPE := recipes/addition_smollm2.toml
BENCH := recipes/countdown_smollm2.toml
# Most tests use one core; two engines would disturb each other's look at a GPU's free memory.
PROCESSES := $(if $(shell command -v nvidia-smi),1,2)

.DEFAULT_GOAL := help
.PHONY: help install install-demo demo compare claims test nightly check bench docs audit clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:  ## create or complete .venv for development; does nothing when it is up to date
	@scripts/install.sh

install-demo:
	@EXTRAS="$(or $(EXTRAS),demo)" scripts/install.sh

demo: install-demo  ## train the embedded model (2 to 12 minutes on two cores), accuracy before and after
	$(BIN)/eggroll-llm train $(RECIPE)

compare: install  ## ES next to GRPO: sums by completions and by the clock, Countdown by the clock, three seeds of each (an hour on two cores)
	$(BIN)/eggroll-llm sweep recipes/sweeps/compare_addition_tokens.toml
	$(BIN)/eggroll-llm sweep recipes/sweeps/compare_addition_time.toml
	$(BIN)/eggroll-llm sweep recipes/sweeps/compare_three_numbers.toml

claims: install  ## the other claims of the papers, measured: about half an hour on two cores; with PPO: make claims EXTRAS=cpu,dev,rl
	$(BIN)/python recipes/claims/run.py

test: install  ## all tests, the ones with the real model and vLLM included
	$(BIN)/pytest --numprocesses=$(PROCESSES) --dist=loadfile --no-loadscope-reorder

nightly: install  ## runs killed at every change of the disk, the graders fuzzed, properties tried often: some minutes, not part of `make test`
	$(BIN)/pytest -s -m "soak or fuzz"
	$(BIN)/pytest --hypothesis-profile=nightly tests/test_fuzz.py tests/rewards tests/eval/test_lm_eval.py

check: install  ## lint, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: install-demo  ## sampling and update speed next to plain vLLM
	$(BIN)/eggroll-llm bench $(BENCH)

docs:  ## build the documentation into build/site; warnings are errors
	test -x build/docs/bin/mkdocs || python3 -m venv build/docs
	build/docs/bin/pip --disable-pip-version-check install --quiet $$(sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	PYTHONPATH=. build/docs/bin/python scripts/configuration_page.py
	NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build --strict --quiet

audit: install  ## look for known vulnerabilities of all that is installed (pip-audit, asks a service on the network)
	python3 -m venv build/audit
	build/audit/bin/pip --disable-pip-version-check install --quiet pip-audit==2.10.1
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' >build/audit/requirements.txt
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement build/audit/requirements.txt

clean:  ## remove builds and caches; .venv, runs and the converted model stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
