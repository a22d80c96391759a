# What each target does is said by `make help`.
.DEFAULT_GOAL := help
SHELL := /bin/bash
bin := .venv/bin
listen ?= 127.0.0.1:7772
# With more than one for each processor, tests that look at time see that of others.
workers ?= 2

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: ## install what developing and testing need
	@scripts/setup.sh test

serve: ## run the server on ./var (listen=HOST:PORT to change the address; CEPH=1 with a Ceph cluster to try)
	@scripts/setup.sh $(if $(CEPH),ceph,serve)
	@mkdir -p var/mnt/disk var/state
	@[ -e var/mnt/disk/settings.json ] || echo '{"max-total-size": "200G", "file-system": "default"}' > var/mnt/disk/settings.json
	@$(if $(CEPH),exec $(bin)/python -m tests.ceph var -- ,exec )$(bin)/elemento-storage serve --root var/mnt --state-dir var/state --listen $(listen)

check: setup ## format, lint, types, layers
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy
	$(bin)/lint-imports
	scripts/no-registry-hosts.sh
	npm --prefix web run --silent check

unit: setup ## the unit and contract tests
	$(bin)/python -m pytest tests/unit tests/contract

integration: setup ## the tests of real components
	$(bin)/python -m pytest tests/integration

e2e: setup ## the tests of the launched server
	$(bin)/python -m pytest tests/e2e

test: check ## everything that CI runs
	$(bin)/python -m pytest tests --durations=15 --numprocesses=$(workers) --dist=loadfile

soak: setup ## the long forms of the crash and load tests
	ELEMENTO_TEST_KILLS=2000 $(bin)/python -m pytest tests/e2e/test_crash_random.py
	ELEMENTO_TEST_LOAD=20 $(bin)/python -m pytest tests/e2e/test_export_data.py

bench: ## side by side with libvirt and qemu-img; writes docs/bench.md
	@scripts/setup.sh test
	@scripts/setup.sh bench
	$(bin)/python -m bench

deb: ## build a Debian package for the Debian this runs on
	@scripts/setup.sh serve
	@scripts/build-deb.sh

screenshots: setup ## docs/images/overview.png, of a server that is made up for it
	$(bin)/python -m tests.screenshots docs/images/overview.png

format: setup ## let ruff format and mend what it can
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

clean: ## remove what the targets above built (not ./var)
	rm -rf .venv build tests/js/node_modules web/node_modules src/elemento_storage/page .mypy_cache .ruff_cache .pytest_cache .import_linter_cache src/*.egg-info

.PHONY: help setup serve check unit integration e2e test soak bench screenshots deb format clean
