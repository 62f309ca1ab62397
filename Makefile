# `make run` needs nothing but Python 3.11 or newer and a network: it makes .venv itself.
# Another interpreter: make PYTHON=python3.12 run. Arguments: make test ARGS="-k floors".

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# An empty file each, as new as the last installation; pyproject.toml being newer repeats it.
RUN_READY := $(VENV)/.run-ready
DEV_READY := $(VENV)/.dev-ready
# bench/ is checked as soon as there is one.
SOURCES := setup.py clevrd tests $(wildcard bench)
LOCK = build/lock/bin/uv --quiet pip compile --upgrade --generate-hashes --python-version 3.12 \
  --custom-compile-command "make lock"
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Installs Debian's packages $(1) where apt-get may; fails elsewhere.
apt_install = if [ "$$(id -u)" = 0 ]; then sudo=; else sudo="sudo -n"; fi; \
  command -v apt-get >/dev/null && $$sudo true 2>/dev/null \
    && echo "Installing for the tests:" $(1) && $$sudo apt-get update -qq \
    && $$sudo env DEBIAN_FRONTEND=noninteractive \
      apt-get install -qq -y --no-install-recommends $(1) >/dev/null
# Installs those of the servers $(1) that are missing, or the packages $(3) that have them; or says
# that $(2) can't run without them.
install_servers = missing=; for name in $(1); do \
    command -v $$name >/dev/null || missing="$$missing $$name"; done; \
  [ -z "$$missing" ] && exit 0; \
  if [ -n "$$CI" ] || [ ! -d /run/systemd/system ]; then \
    { $(call apt_install,$(or $(3),$$missing)); } && exit 0; \
  fi; \
  echo "$(2) can't run without:$$missing" >&2
# Kafka's jars, and when they were copied; the pom being newer repeats it.
KAFKA := build/kafka
KAFKA_READY := $(KAFKA)/.ready
# npm's own note of what it has installed; package-lock.json being newer repeats it.
NODE_TOOLS := tests/javascript
NODE_READY := $(NODE_TOOLS)/node_modules/.package-lock.json

.PHONY: help run test test-long lint types check fmt bench mutants completions screenshot servers browser node proxies prometheus redis kafka \
  systemd dist lock image-test clean
.DEFAULT_GOAL := help

help: ## List these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

run: $(RUN_READY) ## Start the daemon with its defaults
	@exec $(BIN)/clevrd serve $(ARGS)

# All tests run twice as fast so: each module in one of several processes, first those that work, two
# at once, then those that wait for servers, browsers and processes, three at once.
WAITING := $(addprefix tests/,client journal operation sources)
WORKING := $(filter-out $(WAITING),$(patsubst %/,%,$(wildcard tests/*/)))

test: $(DEV_READY) servers ## Run the tests
ifdef ARGS
	@$(BIN)/python -m pytest $(ARGS)
else
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(WORKING); worked=$$?; \
	$(BIN)/python -m pytest -n 3 --dist loadfile $(WAITING) && exit $$worked
endif

test-long: $(DEV_READY) servers ## Run the tests that take long
	@LONG_TESTS=1 $(BIN)/python -m pytest -m long $(ARGS)

servers: browser node proxies prometheus redis kafka systemd ## Install what the tests talk to

# The JavaScript client is tested in it. Who may install it gets it; without it those tests are
# skipped, and fail where CI=true.
browser: ## Install Chromium for the tests, where apt-get may
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  command -v $$name >/dev/null && exit 0; done; \
	{ $(call apt_install,chromium); } && exit 0; \
	echo "There is no Chromium, so the tests of the JavaScript client can't run;" \
	  "on Debian: apt-get install chromium" >&2

# The same of Node and npm, and of the tools in tests/javascript.
node: ## Install Node, where apt-get may, and what the tests need of npm
	@{ command -v node && command -v npm; } >/dev/null || { $(call apt_install,nodejs npm); }; \
	if ! command -v npm >/dev/null; then \
	  echo "There is no npm, so some tests of the JavaScript client can't run;" \
	    "on Debian: apt-get install nodejs npm" >&2; \
	elif [ ! $(NODE_READY) -nt $(NODE_TOOLS)/package-lock.json ]; then \
	  echo "Installing the tools of those tests into $(NODE_TOOLS)/node_modules"; \
	  npm ci --prefix $(NODE_TOOLS) --no-audit --no-fund --loglevel=error >/dev/null \
	    && touch $(NODE_READY) || echo "npm could not install them, so those tests can't run" >&2; \
	fi

# The examples in docs/operations.md are tried out in them. Not installed where systemd would start
# them, unless in CI: a developer may not want a web server for some tests.
proxies: ## Install nginx, HAProxy and Caddy for the tests, where nothing starts them
	@$(call install_servers,nginx haproxy caddy,The tests behind proxies)

# The same of Prometheus, which scrapes a daemon. promtool comes with it.
prometheus: ## Install Prometheus for the tests, where nothing starts it
	@$(call install_servers,prometheus,The tests with Prometheus)

# The same of Redis and its Sentinels, in which several nodes have their journal.
redis: ## Install Redis for the tests, where nothing starts it
	@$(call install_servers,redis-server redis-sentinel,The tests with Redis)

# The same of Kafka: Java and Maven by apt-get, and what tests/kafka/pom.xml names from Maven's
# repository. Those who may not install Java have the tests skipped.
kafka: ## Install Kafka for the tests, where Java is or apt-get may
	@($(call install_servers,java mvn,The tests with Kafka,default-jre-headless maven))
	@if ! { command -v java && command -v mvn; } >/dev/null; then exit 0; fi; \
	if [ ! $(KAFKA_READY) -nt tests/kafka/pom.xml ]; then \
	  echo "Installing Kafka into $(KAFKA) for the tests"; \
	  rm -rf $(KAFKA) && mvn -q -B -f tests/kafka/pom.xml dependency:copy-dependencies \
	    -DincludeScope=runtime -DoutputDirectory=$(CURDIR)/$(KAFKA) >/dev/null \
	    && touch $(KAFKA_READY) || echo "Maven could not get it, so those tests can't run" >&2; \
	fi

# A systemd that is booted in a container, to run the units. Root alone may do that.
systemd: ## Install systemd for the tests of the units, where nothing is started by it
	@command -v systemd-nspawn >/dev/null && [ -x /lib/systemd/systemd ] && [ -x /usr/bin/python3 ] \
	  && exit 0; \
	if [ -n "$$CI" ] || [ ! -d /run/systemd/system ]; then \
	  { $(call apt_install,systemd systemd-sysv dbus systemd-container python3); } && exit 0; \
	fi; \
	echo "The tests of the units can't run without: systemd-nspawn" >&2

lint: $(DEV_READY) ## Check style and formatting
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)

types: $(DEV_READY) ## Check types
	@$(BIN)/mypy $(SOURCES)

check: lint types ## Check style, formatting and types

fmt: $(DEV_READY) ## Format, and fix what can be fixed
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

bench: $(DEV_READY) ## Run the benchmarks
	@$(BIN)/python -m bench $(ARGS)

mutants: $(DEV_READY) ## Put faults into a copy and see whether the tests notice
	@$(BIN)/python -m bench.mutants $(ARGS)

completions: $(DEV_READY) ## Make the shell completion scripts after a change of the command line
	@$(BIN)/python tests/support/completions.py

screenshot: $(DEV_READY) browser ## Take the README's picture of the live page
	@$(BIN)/python tests/support/screenshot.py

dist: $(DEV_READY) ## Make the source distribution and the wheel, in dist/
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist .

# For the Python of the image, whatever this one is. Raised on purpose: commit what it changes.
lock: ## Pin the image's dependencies to their newest versions, with hashes
	@$(PYTHON) -m venv --clear build/lock
	@build/lock/bin/python -m pip --disable-pip-version-check --quiet install uv
	@$(LOCK) --extra jwt --extra otel --extra redis --extra tls pyproject.toml -o requirements.lock
	@$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb")) \
	  ["build-system"]["requires"], sep="\n")' | $(LOCK) - -o requirements-build.lock

image-test: $(DEV_READY) ## Build the container image without an engine and try it out (root)
	@$(BIN)/python tests/support/image.py $(ARGS)

clean: ## Remove the environment, caches and build results
	rm -rf $(VENV) build dist $(NODE_TOOLS)/node_modules *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find clevrd tests $(wildcard bench) -name __pycache__ -type d -exec rm -rf {} +

# Developing includes running, so one installation satisfies both stamps.
$(DEV_READY): pyproject.toml | $(BIN)/pip
	@echo "Installing clevrd and its development tools into $(VENV)"
	@$(PIP) install --editable '.[dev]'
	@touch $(RUN_READY) $@

$(RUN_READY): pyproject.toml | $(BIN)/pip
	@echo "Installing clevrd into $(VENV)"
	@$(PIP) install --editable .
	@touch $@

# pip, because a machine without ensurepip leaves an environment that has python but not pip.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "clevrd needs Python 3.11 or newer, and there is no $(PYTHON) here." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "clevrd needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
	    "name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) can't make virtual environments; on Debian: apt install python3-venv" >&2; \
	    exit 1; }
	@echo "Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
