# Everything a developer or a newcomer runs.  `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install map demo recording test test-tools test-everywhere test-all test-fast test-debian test-musl test-vm test-page test-fleet fleet-demo wheels packages lint format docs bench rivals everycall soak clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

NEEDS_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 >= 3.11 is needed; run make PYTHON=...")'

install: $(INSTALLED) ## make .venv with the three packages, editable, and the developers' tools

$(INSTALLED): pyproject.toml client_lib/pyproject.toml exporter/pyproject.toml
	@$(NEEDS_PYTHON)
	$(PYTHON) -m venv $(VENV)
	@# An older pip writes commands that import re: 0.3 MB more for a process that does not use it.
	$(BIN)/pip install --quiet --disable-pip-version-check 'pip>=25'
	$(BIN)/pip install --quiet --disable-pip-version-check -e client_lib -e '.[dev]' -e './exporter[web]'
	@# Python loads setuptools' substitute for distutils at each start: 1 ms of CPU, and nothing here uses it.
	@rm -f $(VENV)/lib/python*/site-packages/distutils-precedence.pth
	@touch $@

demo: $(BIN)/SocketProtector ## show releases and kills under load, and count the connections that fail (20 s)
	@$(BIN)/SocketProtector demo

# Without the developers' tools, and without a change to a .venv that has it already.
$(BIN)/SocketProtector:
	@$(NEEDS_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e client_lib -e .

CHOSEN := --once
#: What to leave out, in tests/.
WITHOUT :=
#: Where the logs of failed tests go; without a name, into the output, before the summary.
LOGS := build/failed-tests.log
# Most tests wait for processes most of the time: with 9 two cores were idle for a quarter of the
# run, with 14 never.  Each takes 2 s of CPU before its first test, and 150 MB.
JOBS := 12

# Each of pytest's processes imports all tests, and hypothesis there the characters that text may
# have.  Here one process compiles both for all.  (What cannot be collected fails below.)
COLLECTED := $(VENV)/.collected

$(COLLECTED): $(INSTALLED) $(shell find tests -name '*.py')
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --collect-only -qq tests >/dev/null || true
	@$(BIN)/python -c 'from hypothesis.internal import charmap; charmap.intervals_from_codec("utf-8")' || true
	@touch $@

test-tools: # install the other programs that tests need; if that fails, each test names what it needs
	-tools/install-packages gcc g++ libc6-dev valgrind libc6-dbg perl ruby
	-tools/install-packages nodejs nginx-light starlet starman strace util-linux
	-tools/install-packages golang-go
	-command -v rustc >/dev/null || tools/install-packages rustc
	-tools/install-packages apparmor curl haproxy iproute2 libserver-starter-perl logrotate openssl policycoreutils-python-utils stunnel4 systemd
	-tools/install-packages jq netcat-openbsd python3-click python3-daemon python3-psutil python3-rich python3-prometheus-client

test: $(INSTALLED) $(COLLECTED) test-tools ## run most tests in one combination (installs compilers, interpreters and servers)
	@# Tests write this path into shell scripts and command lines, where a space would end it.
	@case "$(CURDIR)" in *" "*) echo "make test: the path '$(CURDIR)' has a space; clone the repository to another path" >&2; exit 2;; esac
	@# Where PYTHONDONTWRITEBYTECODE is set, each of thousands of processes would compile all it imports.
	@$(BIN)/python -m compileall -q -j 0 client_lib exporter sample_client socketprotector tests
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(CHOSEN) $(if $(LOGS),--logs-in $(LOGS)) $(addprefix --ignore=tests/,$(WITHOUT)) tests

test-all: export SOCKETPROTECTOR_ROUNDS = many
test-all: CHOSEN :=
test-all: test ## run them in every combination, with many more rounds (before a release)

test-everywhere: ## run `make test` as each kind of user, Python and Debian, and under load (root; an hour) [ONLY='user trixie' TIMES=3]
	$(PYTHON) tools/test_everywhere.py $(if $(TIMES),--times $(TIMES)) $(ONLY)

test-debian: $(INSTALLED) ## run the tests with the Pythons of Debian's suites (root; minutes; DEBIAN_ROOTS=FOLDER keeps them)
	tools/install-packages debootstrap
	$(BIN)/python -m pytest -v --shared-world tests/systems/debian.py

MUSL ?= .musl

test-musl: $(INSTALLED) ## build a CPython with musl in MUSL=.musl, unless it exists, and run the tests with it
	PYTHON=$(BIN)/python tools/musl-python $(MUSL)
	MUSL_PYTHON=$(MUSL) $(BIN)/python -m pytest -v tests/systems/test_musl.py

AXE := .axe/node_modules/axe-core
LOADED_S ?= 1

test-page: docs ## test the page and the documents' site in headless Chromium, test the rules by promtool, and measure the cost [SHOTS=FOLDER LOADED_S=600: screenshots after that load]
	tools/install-packages chromium chromium-driver fonts-dejavu-core prometheus
	command -v npm >/dev/null || tools/install-packages npm
	npm install --silent --no-audit --no-fund --no-save --prefix .axe axe-core@4.14.1
	SOCKETPROTECTOR_AXE=$(AXE)/axe.min.js SOCKETPROTECTOR_SHOTS=$(abspath $(SHOTS)) SOCKETPROTECTOR_LOADED_S=$(LOADED_S) \
		$(BIN)/python -m pytest -s --shared-world tests/browser tests/unit/exporter/test_monitoring.py
	$(BIN)/python -m bench.page 10

#: What builds the Debian packages.
DEB_TOOLS := debhelper dh-python dpkg-dev pybuild-plugin-pyproject python3-all python3-click python3-hatchling

test-vm: $(INSTALLED) ## test under real systemds in an emulated machine (root; half an hour a system and more) [ONLY='bookworm and package and not 5.10']
	-tools/install-packages qemu-system-x86 debootstrap e2fsprogs gcc libc6-dev haproxy iproute2
	-tools/install-packages $(DEB_TOOLS)
	$(BIN)/python -m pytest -s --shared-world tests/vm $(if $(ONLY),-k '$(ONLY)')

map: ## print each module with the first sentence of its docstring
	@$(PYTHON) tools/modules.py

test-fast: $(INSTALLED) ## run the tests of the model, the core and the imports (seconds)
	$(BIN)/python -m pytest -n 2 tests/test_imports.py tests/unit/model tests/unit/core tests/unit/system tests/unit/launch tests/unit/daemon

wheels: $(INSTALLED) ## build wheel and sdist of each distribution into dist/, the same for the same commit
	rm -rf dist
	PYTHON=$(BIN)/python packaging/build-dists dist

TOOLS := $(VENV)/packaging

$(TOOLS)/.installed: packaging/requirements.txt | $(INSTALLED)
	$(BIN)/python -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

packages: $(INSTALLED) $(TOOLS)/.installed ## build each package, inspect it, install, use and remove it (minutes; DEBIAN_ROOTS=FOLDER keeps systems)
	-tools/install-packages $(DEB_TOOLS) debootstrap fish lintian zsh
	-tools/install-packages buildah libarchive-tools makepkg pacman-package-manager rpm rpmlint
	$(BIN)/python -m pytest -v --shared-world tests/packages/published.py tests/packages/deb.py \
		tests/packages/foreign.py tests/packages/image.py

CAST := docs/images/demo.cast

recording: $(INSTALLED) $(TOOLS)/.installed ## record the demo in a terminal, and draw README's picture of it (30 s, once its tools are installed)
	PATH="$(abspath $(BIN)):$$PATH" TERM=xterm-256color SHELL=/bin/sh $(TOOLS)/bin/asciinema rec --quiet --overwrite --cols 80 --rows 24 \
		--command 'SocketProtector demo' $(CAST)
	@# Frames of 0.4 s and more, which is half of the size; at the end 6 s for reading how many have failed.
	$(TOOLS)/bin/termtosvg-ng render $(CAST) $(CAST:.cast=.svg) --min-frame-duration 400 --loop-delay 6000 --template window_frame --theme powershell

FLEET := $(VENV)/fleet

$(FLEET)/.installed: deploy/requirements.txt | $(INSTALLED)
	$(BIN)/python -m venv $(FLEET)
	$(FLEET)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

test-fleet: $(INSTALLED) $(FLEET)/.installed ## release to five namespaced hosts behind HAProxy by Ansible, and parse deploy/ (root; minutes) [FLEET_RELEASES=20]
	-tools/install-packages haproxy iproute2 nginx-light openssh-client openssh-server util-linux
	$(BIN)/python -m pytest -v -rP --shared-world tests/fleet/test_files.py tests/fleet/rolling.py tests/fleet/failures.py

fleet-demo: $(INSTALLED) $(FLEET)/.installed ## show releases to five hosts under load, a bad one stopped at its first host (root; two minutes)
	-tools/install-packages haproxy iproute2 openssh-client openssh-server util-linux
	@$(BIN)/python -m tests.fleet.demo

lint: $(INSTALLED) ## ruff check and format, mypy --strict, shellcheck, tables of the documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run packaging/build-completions packaging/build-dists packaging/build-deb packaging/link-pictures packaging/upgrade-running tools/as-user tools/install-packages tools/musl-python tools/vm-root \
		tools/vm-image deploy/ansible/release $(wildcard init.d/socketprotector init.d/*.sh)
	$(BIN)/python tools/reference.py --check

format: $(INSTALLED) ## let ruff format the code and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

DOCS := $(VENV)/docs
SITE := build/site

$(DOCS)/.installed: tools/site/requirements.txt | $(INSTALLED)
	$(BIN)/python -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

docs: $(INSTALLED) $(DOCS)/.installed ## rewrite tables and man page from the code, and build the documents' site in build/site
	$(BIN)/python tools/reference.py
	rm -rf $(SITE) build/doctrees
	$(DOCS)/bin/python -m sphinx -n -W --keep-going -q -d build/doctrees -c tools/site . $(SITE)
	$(BIN)/python -m pytest -q tests/pages/built_site.py

bench: $(INSTALLED) ## measure and print the table of figures (more than an hour; installs a C compiler)
	tools/install-packages gcc libc6-dev
	$(BIN)/python -m bench

ROUND_S ?= 15

rivals: $(INSTALLED) ## measure and test other supervisors beside it (root; two hours; continues where it was stopped) [ONLY="nginx ours-listener" ROUND_S=15]
	-tools/install-packages gcc libc6-dev nginx-light
	@# Where PYTHONDONTWRITEBYTECODE is set, each worker would compile what it imports.
	@$(BIN)/python -m compileall -q -j 0 bench client_lib socketprotector
	@$(BIN)/python -m bench.rivals $(ONLY) --round $(ROUND_S)

everycall: $(INSTALLED) ## let each system call of each line fail once, or kill there, in each operation (two hours; continues where it was stopped) [ONLY="reload,stop" FOR=480]
	-tools/install-packages gcc libc6-dev
	$(BIN)/python -m tests.everycall $(if $(ONLY),--only $(ONLY)) $(if $(FOR),--minutes $(FOR))

MINUTES ?= 3

soak: $(INSTALLED) ## disturb a loaded service at random for MINUTES=3 [SEED=N], simulate for as long, and report
	$(BIN)/python -m bench.soak $(MINUTES) $(if $(SEED),--seed $(SEED))

clean: ## remove .venv and the files that tools leave
	rm -rf $(VENV) $(MUSL) .axe build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/answer bench/away.so bench/flips bench/forward bench/least bench/load bench/many bench/serve bench/stamp
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
