"""The floods of bench-security: each is begun, lasts for LASTS seconds and ends by itself.

Those of a guest and of a build are made within what is attacked, and pay with its share of the processors. Those of clients are made by a
process of this machine that would be on another one: it runs behind all others (nice 19), and its processor time is told apart.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outside import SERVER
from service import Instance, until
from wire import get

from vmm.network import HOST_ADDRESS

SECONDS = float(os.environ.get("SECONDS", "4"))
RAMP = 1.0
LASTS = RAMP + 1.25 * SECONDS + 2  # the neighbour is asked in its midst (asked.py)
WRK_CONNECTIONS = 32
_PATIENCE = 60.0
BURNER = """FROM public.ecr.aws/lambda/microvms:al2023-minimal
RUN : {mark}; end=$(($(date +%s) + {seconds})); \\
    (while [ $(date +%s) -lt $end ]; do i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; done) & \\
    while [ $(date +%s) -lt $end ]; do dd if=/dev/zero of=/burnt bs=1M count=64 conv=fsync 2>/dev/null; done; wait; exit 1
"""


@dataclass
class Attack:
    """`pid`: of the generator, where it is a process of this machine. `done`: what it did in LASTS seconds, where it counts, once it is
    over."""

    pid: int | None = None
    done: int = 0


@dataclass
class Attacker:
    """The account that attacks, its microVM with the flooding application in it, and that one's token."""

    instance: Instance
    vm: dict[str, Any]
    token: str

    def ask(self, path: str) -> bytes:
        answer = get(self.vm["endpoint"], self.instance.root / "tls/ca.crt", self.token, path, _PATIENCE)
        assert answer.status == 200, answer
        return answer.body


Flood = Callable[[Attacker], AbstractContextManager[Attack]]


def guest(what: str, address: str = SERVER) -> Flood:
    """A flood of the application's (guest/flood.c)."""

    @contextlib.contextmanager
    def flood(attacker: Attacker) -> Iterator[Attack]:
        before, end = int(attacker.ask("/count")), time.monotonic() + LASTS
        assert attacker.ask(f"/flood?what={what}&seconds={LASTS}&address={address}") == b"ok"
        attack = Attack()
        time.sleep(RAMP)
        yield attack
        time.sleep(max(0.0, end + 0.5 - time.monotonic()))
        attack.done = int(attacker.ask("/count")) - before

    return flood


@contextlib.contextmanager
def generator(words: list[str], pattern: str) -> Iterator[Attack]:
    """A process behind all others, which prints what it did."""
    with subprocess.Popen(["nice", "-n", "19", *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            attack = Attack(process.pid)
            time.sleep(RAMP)
            yield attack
            said, _ = process.communicate(timeout=_PATIENCE)
            found = re.search(pattern, said)
            assert found is not None, said
            attack.done = int(found[1])
        finally:
            process.kill()


def requests(is_allowed: bool) -> Flood:
    """wrk: as many requests as are answered, with a token or none."""

    def flood(attacker: Attacker) -> AbstractContextManager[Attack]:
        fields = [f"Host: {attacker.vm['endpoint']}", *([f"X-aws-proxy-auth: {attacker.token}"] if is_allowed else [])]
        words = ["wrk", "-t1", f"-c{WRK_CONNECTIONS}", f"-d{LASTS:.0f}s", *(part for one in fields for part in ("-H", one))]
        return generator([*words, f"https://127.0.0.1:{attacker.instance.edge_port}/"], r"(\d+) requests in")

    return flood


def own(kind: str) -> Flood:
    """A flood of flooding.py's."""

    def flood(attacker: Attacker) -> AbstractContextManager[Attack]:
        script = str(Path(__file__).with_name("flooding.py"))
        words = [sys.executable, script, kind, str(attacker.instance.edge_port), attacker.vm["endpoint"], attacker.token, str(LASTS)]
        return generator(words, r"^(\d+)$")

    return flood


@contextlib.contextmanager
def build(attacker: Attacker) -> Iterator[Attack]:
    """A step that computes and writes, and fails at its end, so that nothing is made of it."""
    instance, mark = attacker.instance, f"burner-{time.monotonic_ns()}"
    uri = instance.upload({"Dockerfile": BURNER.format(mark=mark, seconds=round(LASTS))}, f"{mark}.zip")
    arn = instance.create(mark, uri)
    until(lambda: _runs(mark), _PATIENCE)
    attack = Attack()
    time.sleep(RAMP)
    yield attack
    built = instance.built(arn)
    assert built["buildState"] == "FAILED", built
    instance.client().delete_microvm_image(imageIdentifier=arn)


def _runs(mark: str) -> bool:
    """Whether a step with this mark runs: its shell has the text."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"/bin/sh\0-c\0: " + mark.encode()):
                return True
    return False


FLOODS: dict[str, Flood] = {
    "guest_spin": guest("spin"), "guest_forks": guest("forks"), "guest_memory": guest("memory"), "host_disk": own("disk"),
    "guest_disk": guest("disk"), "guest_packets": guest("packets"), "guest_connections": guest("connections"), "log": guest("lines"),
    "names": guest("names", HOST_ADDRESS), "build": build, "host_spin": own("spin"), "client_without_token": requests(False),
    "client_with_token": requests(True), "connections": own("silent"), "http2_resets": own("resets"), "http2_pings": own("pings"),
}  # fmt: skip
