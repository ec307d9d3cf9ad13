# Thin: tools/setup.py installs, the other targets run one command each. Extra arguments: ARGS="...".
#
#   PYTHON=/path/to/python3.12   the Python to set up with (default: 3.11 or 3.12 from PATH)

found := $(or $(PYTHON),$(firstword $(foreach name,python3 python3.12 python3.11,$(shell command -v $(name)))))
setup := $(if $(found),$(found) tools/setup.py,echo "no Python found; install Python 3.11 or 3.12" >&2; exit 1;)
python := .venv/bin/python

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

.PHONY: serve
serve: ## set up what is missing, then run tritonserver here until Ctrl-C (ARGS: its options)
	@$(setup)
	@exec $(python) -m tools.serve $(ARGS)

.PHONY: test
test: ## set up what is missing, then run the tests, two at a time (ARGS: pytest's)
	@$(setup) --extras test --perf
	@exec $(python) -m pytest -n 2 --dist loadgroup $(ARGS)

.PHONY: faults
faults: ## the fault tests in their long form: 100 kills of the engine, 20,000 connects (ARGS: pytest's)
	@$(setup) --extras test --perf
	@exec $(python) -m pytest tests/test_recovery.py tests/test_faults.py tests/test_shutdown.py \
		--kills=100 --connects=20000 --timeout=1200 $(ARGS)

.PHONY: lint
lint: ## ruff and mypy
	@$(setup) --extras test
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy

.PHONY: perf
perf: ## perf_analyzer on both doors (ARGS: --http-url, --grpc-url of a running server; its options)
	@$(setup) --perf
	@exec $(python) -m tools.perf $(ARGS)

.PHONY: bench
bench: ## the serving benchmark
	@$(setup) --perf
	@exec $(python) -m bench.serving $(ARGS)

.PHONY: soak
soak: ## half an hour of mixed traffic with cancellations and faults (ARGS: --minutes 5, --out FILE)
	@$(setup)
	@exec $(python) -m bench.soak $(ARGS)

.PHONY: accuracy
accuracy: ## the share of the default checkpoint's tasks that a running server answers exactly
	@$(setup)
	@exec $(python) -m bench.accuracy $(ARGS)

.PHONY: demo-checkpoint
demo-checkpoint: ## train the default checkpoint anew
	@$(setup)
	@exec $(python) -m tools.demo.train --out model_repository/llm/demo_checkpoint $(ARGS)

.PHONY: setup
setup: ## only set up (ARGS: --extras gpu test, --perf)
	@$(setup) $(ARGS)

.PHONY: lock
lock: ## resolve pyproject.toml anew and write requirements.lock
	@$(setup)
	@$(setup) --lock

.PHONY: audit
audit: ## what is installed, against the versions and hashes of requirements.lock
	@$(setup)
	@exec $(python) -m tools.audit

.PHONY: clean
clean: ## remove all that was set up
	rm -rf .venv .triton *.egg-info .mypy_cache .pytest_cache .ruff_cache
