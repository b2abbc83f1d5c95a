# Torpor. `make demo` and `make test` set up what they need on a bare Debian 12 (as root) and then do their work.

PACKAGES = python3 python3-venv python3-dev gcc make musl-tools linux-libc-dev qemu-system-x86 qemu-utils slirp4netns \
	mmdebstrap lz4 e2fsprogs nftables iproute2 kmod util-linux curl ca-certificates openssl git libnss-myhostname
FRESH_PACKAGES = python3 mmdebstrap slirp4netns git util-linux nftables
BENCH_PACKAGES = nginx-light haproxy nghttp2-client wrk hey libssl-dev valgrind
CONFORMANCE_PACKAGES = nghttp2-client nodejs chromium openssl curl awscli sslscan testssl.sh apache2-utils siege wrk hey httperf \
	python3-locust
VENV = .venv
AUTOCANNON = $(VENV)/autocannon
SECURITY_PACKAGES = net-tools
TUNNELS = $(VENV)/tunnels
APPLICATIONS_PACKAGES = nodejs chromium curl git openssh-client
CLIENTS = $(VENV)/clients
TOOLS = $(VENV)/tools
PY = $(VENV)/bin/python
PIP = -qq --disable-pip-version-check --no-cache-dir --no-deps
export TORPOR_CACHE ?= /var/cache/torpor

# Asking dpkg is quick; apt is called only for what is missing, once dpkg is through with what was ended in its middle. RUNLEVEL=1 keeps
# packages from starting services.
install = there="$$(dpkg-query -W -f='$${db:Status-Abbrev}$${Package} ' $(1) 2>/dev/null)"; missing=""; \
	for package in $(1); do case "$$there" in *"i $$package "*) ;; *) missing="$$missing $$package" ;; esac; done; \
	if [ -n "$$missing" ]; then echo "setup: apt-get install$$missing"; dpkg --configure -a && apt-get -q update >/dev/null && \
	RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends $$missing >/dev/null; fi

# The parts of test-kvm: each in a machine of its own, in less than an hour (tests/kvm/inner.py).
KVM = drivers-firecracker drivers-qemu devices service-firecracker kills-firecracker clients-firecracker archive-firecracker service-qemu kills-qemu clients-qemu

.PHONY: help setup deps venv assets compiled demo serve test test-long test-long-rest test-long-images test-long-corpus test-long-applications test-long-faults test-long-load test-long-fuzz test-long-systemd test-kvm $(KVM:%=test-kvm-%) test-fresh test-fresh-odd fresh-packages check static lint types unit walls applications-packages security-packages conformance conformance-packages bench-api bench-drivers bench-lifecycle bench-edge bench-edge-instructions bench-neighbours bench-security bench-idle bench-builds bench-packages lock tools sbom audit clean

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 28

setup: deps ## install packages and Python libraries, make kernel, initramfs and base image, compile the edge
	@$(MAKE) --no-print-directory -j2 assets compiled

# The virtual environment is another one for another lock, another Python, or another place, whose name its programs have in them.
KEY = $(shell { cat requirements.lock pyproject.toml; /usr/bin/python3 -V; pwd; } 2>&1 | sha256sum | cut -d" " -f1)

# The service's processes are users of their own, who read the code: also where a umask of 077 made the clone.
deps:
	@$(call install,$(PACKAGES))
	@chmod go+rX . && chmod -R go+rX config gateway tests vmm
	@[ "$$(cat $(VENV)/ready 2>/dev/null)" = "$(KEY)" ] || $(MAKE) --no-print-directory venv

# The lock names every package and the digests of its files: nothing has to be resolved, and what an index or a mirror gives in their place
# is refused. Two pips at a time, 34 packages each, take less than half as long as one.
locked = mkdir $(VENV)/lock && awk -v to=$(VENV)/lock '/^[^ ]/ { n++ } { print > (to "/" int((n - 1) / 34)) }' requirements.lock && \
	printf '%s\0' $(VENV)/lock/* | xargs -0 -n 1 -P 2 $(VENV)/bin/pip install $(PIP) --no-compile --require-hashes -r && rm -r $(VENV)/lock

# What is imported is compiled then. The key goes first, and is written when all is on the disk. One set-up at a time; the next one finds what
# it has made.
venv:
	@umask 022; mkdir -p $(VENV) && exec 9<$(VENV) && flock 9 || exit 1; \
	[ "$$(cat $(VENV)/ready 2>/dev/null)" != "$(KEY)" ] || exit 0; \
	echo "setup: Python libraries into $(VENV)"; rm -f $(VENV)/ready && /usr/bin/python3 -m venv --clear $(VENV) && \
	$(locked) && \
	$(VENV)/bin/pip install $(PIP) --no-build-isolation -e . && $(PY) config/scripts.py && \
	$(VENV)/bin/torpor version >/dev/null && sync -f $(VENV) && echo $(KEY) > $(VENV)/ready

assets: deps
	@$(VENV)/bin/torpor assets

compiled: deps
	@$(PY) -c "from gateway.edge.native import main; main()"

demo: setup ## the walk-through, on real microVMs (IDLE=1: let the idle policy suspend)
	@$(PY) config/demo.py

serve: setup ## run the service for yourself; prints the exports for another shell
	@$(VENV)/bin/torpor serve

test: setup check walls ## every test but the long ones
	@$(PY) -m pytest -q -m "(vm or service) and not long and not conformance" tests

test-long: test test-long-rest test-long-images test-long-corpus test-long-applications test-long-faults test-long-load test-long-fuzz test-long-systemd test-kvm test-fresh test-fresh-odd ## every test, in parts of less than an hour each

test-long-rest: setup security-packages ## those of the long tests that have no part of their own
	@$(PY) -m pytest -q -m "long and not conformance" --ignore=tests/unit/test_mixed_load.py --ignore=tests/fidelity --ignore=tests/applications --ignore=tests/faults --ignore=tests/systemd --ignore=tests/kvm --ignore=tests/fuzz tests

test-long-images: setup ## rows of the table of images that are too slow for make test (tests/fidelity)
	@$(PY) -m pytest -q -m "long and not corpus" tests/fidelity

test-long-corpus: setup ## its applications, built and used as their users do
	@$(PY) -m pytest -q -m "corpus" tests/fidelity

test-long-applications: setup applications-packages ## applications with their real clients, put to sleep and woken (docs/applications.md)
	@$(PY) -m pytest -q -m "applications" tests/applications

# What carries data out by names is unpacked, not installed: its packages would bring udev, and services of their own.
security-packages: deps
	@$(call install,$(SECURITY_PACKAGES))
	@test -e $(TUNNELS)/ready || { echo "setup: iodine and dns2tcp into $(TUNNELS)"; rm -rf $(TUNNELS); mkdir -p $(TUNNELS) && cd $(TUNNELS) && \
	apt-get -q update >/dev/null && apt-get -q -o APT::Sandbox::User=root download iodine dns2tcp >/dev/null && for package in *.deb; do dpkg -x $$package . || exit 1; done && \
	rm *.deb && touch ready; }

# The clients' packages are below the virtual environment, not in it: the service's lock knows nothing of them.
applications-packages: deps
	@$(call install,$(APPLICATIONS_PACKAGES))
	@command -v npm >/dev/null || { $(call install,npm); }
	@key=$$(cat tests/applications/clients/requirements.txt tests/applications/clients/package.json | sha256sum); \
	[ "$$(cat $(CLIENTS)/ready 2>/dev/null)" = "$$key" ] || { echo "setup: clients of applications into $(CLIENTS)"; rm -rf $(CLIENTS); \
	mkdir -p $(CLIENTS) && cp tests/applications/clients/package.json $(CLIENTS) && \
	$(PY) -m pip install -qq --disable-pip-version-check --no-cache-dir --target $(CLIENTS)/python -r tests/applications/clients/requirements.txt && \
	npm install --silent --no-audit --no-fund --ignore-scripts --cache $(CLIENTS)/cache --prefix $(CLIENTS) && rm -rf $(CLIENTS)/cache && \
	echo "$$key" > $(CLIENTS)/ready; }

test-long-faults: setup ## a fault at each call of each step of a session's life, simulated; a bad day in ten minutes, on real microVMs (BAD_DAY_SECONDS=120: shorter)
	@$(PY) -m pytest -q -s -m faults tests/faults

test-long-load: setup ## ten minutes of clients of all kinds at once against edge workers (MIXED_LOAD_SECONDS=60: shorter)
	@$(PY) -m pytest -q -s -m long tests/unit/test_mixed_load.py

test-long-fuzz: setup ## an hour of inputs that nobody thought of, for each parser of what strangers say (FUZZ_SECONDS=60: shorter; FUZZ_SEED=…: the same again)
	@$(PY) -m pytest -q -s -m long tests/fuzz

test-long-systemd: setup ## the units in a Debian with systemd, in a machine of its own
	@$(PY) -m pytest -q -s tests/systemd

test-kvm: $(KVM:%=test-kvm-%) ## drivers and service on KVM, with QEMU and the real Firecracker, in machines of their own

$(KVM:%=test-kvm-%): test-kvm-%: setup
	@KVM_PARTS=$* $(PY) -m pytest -q -s tests/kvm

test-fresh: fresh-packages ## both commands of the README on a machine that has seen nothing (RELEASE=trixie: of another Debian)
	@/usr/bin/python3 tests/fresh.py $(if $(RELEASE),--release $(RELEASE),--record)

test-fresh-odd: fresh-packages ## make demo and make check there, with /tmp noexec, umask 077, a space in the path, LANG=C, 1024 descriptors
	@/usr/bin/python3 tests/fresh.py --odd

fresh-packages:
	@$(call install,$(FRESH_PACKAGES))

check: deps ## lint, types, unit tests: some 70 seconds on two processors
	@$(MAKE) --no-print-directory -j2 static unit

static: lint types

lint:
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check -q .

types:
	@$(VENV)/bin/mypy

# Each worker reads every test's module: what one has compiled the others find, also where the environment says that nothing is kept.
QUICK = -q -n $$(( $$(nproc) * 2 )) --dist worksteal -m "not vm and not service and not long"
unit walls: export PYTHONDONTWRITEBYTECODE =

unit:
	@$(PY) -m pytest -q --collect-only tests/unit >/dev/null
	@$(PY) -m pytest $(QUICK) --ignore=tests/security --ignore=tests/fuzz tests

walls: deps ## attacks on each wall, with its control, and some seconds of fuzzing: what needs no microVM
	@$(PY) -m pytest $(QUICK) tests/security tests/fuzz

conformance: setup conformance-packages ## every protocol and client against a real endpoint; writes docs/conformance.md
	@CONFORMANCE_TABLE=docs/conformance.md $(PY) -m pytest -q -m conformance tests/conformance tests/security/test_smuggling.py

conformance-packages:
	@$(call install,$(CONFORMANCE_PACKAGES))
	@command -v npm >/dev/null || { $(call install,npm); }
	@test -e $(AUTOCANNON)/node_modules || npm install --silent --no-audit --no-fund --ignore-scripts --cache $(AUTOCANNON)/cache --prefix $(AUTOCANNON) autocannon@8.0.0

bench-drivers: setup ## QEMU and Firecracker under KVM, beside Firecracker by hand, in a machine of its own (ROUNDS=3: fewer)
	@$(PY) benchmarks/drivers.py

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

bench-security: setup bench-packages ## what floods of one account's guest, build and clients cost another account's session
	@$(PY) benchmarks/security.py

bench-idle: setup ## what 1,000 suspended sessions cost
	@$(PY) benchmarks/idle.py

bench-builds: setup ## a first build, and the same again with another app.py
	@$(PY) benchmarks/builds.py

bench-packages:
	@$(call install,$(BENCH_PACKAGES))

# With the digests of all files of each release, so that another Python or processor finds its own among them.
lock: tools ## write requirements.lock: what is installed, with the digests of its releases' files (two minutes)
	@$(VENV)/bin/pip freeze --all --exclude-editable --exclude torpor --exclude pip > $(VENV)/frozen
	@rm -f $(VENV)/hashed && $(TOOLS)/bin/pip-compile -q --generate-hashes --allow-unsafe --no-annotate --no-header --no-emit-options --strip-extras -o $(VENV)/hashed $(VENV)/frozen
	@grep -v -e '^#' -e '^$$' $(VENV)/hashed > requirements.lock

# In an environment of their own: the service's lock knows nothing of them.
tools: deps
	@test -e $(TOOLS)/ready || { echo "setup: pip-tools and pip-audit into $(TOOLS)"; rm -rf $(TOOLS); /usr/bin/python3 -m venv $(TOOLS) && \
	$(TOOLS)/bin/pip install -qq --disable-pip-version-check --no-cache-dir pip-tools==7.6.2 pip-audit==2.10.1 && touch $(TOOLS)/ready; }

sbom: setup ## write sbom.cdx.json (CycloneDX): packages with their digests, kernel, initramfs, agent, Debian packages of the roots
	@$(PY) config/sbom.py > sbom.cdx.json && echo "sbom.cdx.json: $$(grep -c bom-ref sbom.cdx.json) components"

audit: tools ## hold the lock against the database of known faults; status 2 where that cannot be had
	@$(PY) config/audit.py $(TOOLS)/bin/pip-audit requirements.lock

clean: ## remove the virtual environment and caches of tools
	rm -rf $(VENV)/ready $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
