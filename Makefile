# Torpor. `make demo` and `make test` set up what they need on a bare Debian 12 (as root) and then do their work.

PACKAGES = python3 python3-venv python3-dev gcc make musl-tools linux-libc-dev qemu-system-x86 qemu-utils buildah uidmap slirp4netns \
	mmdebstrap lz4 e2fsprogs nftables iproute2 kmod util-linux curl ca-certificates libnss-myhostname
BENCH_PACKAGES = nginx-light haproxy nghttp2-client wrk hey libssl-dev valgrind
CONFORMANCE_PACKAGES = nghttp2-client nodejs chromium openssl curl awscli sslscan testssl.sh
VENV = .venv
PY = $(VENV)/bin/python
export TORPOR_CACHE ?= /var/cache/torpor

# Asking dpkg is quick; apt is called only for what is missing. RUNLEVEL=1 keeps packages from starting services.
install = missing=""; for package in $(1); do dpkg -s $$package >/dev/null 2>&1 || missing="$$missing $$package"; done; \
	if [ -n "$$missing" ]; then echo "setup: apt-get install$$missing"; apt-get -q update >/dev/null && \
	RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends $$missing >/dev/null; fi

.PHONY: help setup deps assets compiled demo serve test test-long check lint types unit conformance conformance-packages bench-api bench-lifecycle bench-edge bench-edge-instructions bench-neighbours bench-idle bench-builds bench-packages lock clean

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: deps ## install packages and Python libraries, make kernel, initramfs and base image, compile the edge
	@$(MAKE) --no-print-directory -j2 assets compiled

# The lock names every package: nothing has to be resolved, two at a time take less than half as long as one, and what is imported is
# compiled then.
deps: $(VENV)/ready
$(VENV)/ready: requirements.lock pyproject.toml
	@$(call install,$(PACKAGES))
	@echo "setup: Python libraries into $(VENV)"
	@/usr/bin/python3 -m venv --clear $(VENV)
	@xargs -n 34 -P 2 $(VENV)/bin/pip install -qq --disable-pip-version-check --no-deps --no-compile < requirements.lock
	@$(VENV)/bin/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(VENV)/bin/torpor version >/dev/null
	@touch $@

assets: deps
	@$(VENV)/bin/torpor assets

compiled: deps
	@$(PY) -c "from gateway.edge.native import main; main()"

demo: setup ## the walk-through, on real microVMs (IDLE=1: let the idle policy suspend)
	@$(PY) config/demo.py

serve: setup ## run the service for yourself; prints the exports for another shell
	@$(VENV)/bin/torpor serve

test: setup check ## every test but the long ones
	@$(PY) -m pytest -q -m "(vm or service) and not long and not conformance" tests

test-long: setup ## every test
	@$(PY) -m pytest -q -m "not conformance" tests

check: deps lint types unit ## lint, types, unit tests: under a minute

lint:
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check -q .

types:
	@$(VENV)/bin/mypy

unit:
	@$(PY) -m pytest -q -n auto -m "not vm and not service and not long" tests

conformance: setup conformance-packages ## every protocol and client against a real endpoint; writes docs/conformance.md
	@CONFORMANCE_TABLE=docs/conformance.md $(PY) -m pytest -q -m conformance tests/conformance

conformance-packages:
	@$(call install,$(CONFORMANCE_PACKAGES))

bench-lifecycle: setup ## launch, suspend, resume, beside the bare hypervisor
	@$(PY) benchmarks/lifecycle.py

bench-api: deps ## the control plane, beside moto's server
	@$(PY) benchmarks/api.py

bench-edge: setup bench-packages ## the endpoint proxy, beside nginx, haproxy and aiohttp
	@$(PY) benchmarks/edge.py

bench-edge-instructions: setup bench-packages ## what the endpoint proxy executes for a request, beside an older checkout: OLD=DIR
	@$(PY) benchmarks/instructions.py "$(OLD)"

bench-neighbours: setup bench-packages ## what slow clients and a flood on one session cost another
	@$(PY) benchmarks/neighbours.py

bench-idle: setup ## what 1,000 suspended sessions cost
	@$(PY) benchmarks/idle.py

bench-builds: setup ## a first build, and the same again with another app.py
	@$(PY) benchmarks/builds.py

bench-packages:
	@$(call install,$(BENCH_PACKAGES))

lock: ## write requirements.lock from pyproject.toml
	@$(VENV)/bin/pip freeze --all --exclude-editable --exclude torpor --exclude pip > requirements.lock

clean: ## remove the virtual environment and caches of tools
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
