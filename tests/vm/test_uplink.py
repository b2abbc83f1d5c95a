"""The host's network while microVMs come and go: it does not change. Browsers on the host end their connections when it does."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from outside import SERVER, UPLINK, Outside
from service import Instance, until
from test_guest_services import Guest

pytestmark = pytest.mark.vm
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}


_MARK, _PEER = "90001", "90002"  # a device that is gone when its line is written has no name there, but its index


class Monitor:
    """What `ip monitor` says of a namespace's devices, addresses, routes, rules and settings; not of neighbours, whose entries age."""

    def __init__(self, namespace: str) -> None:
        self._enter = ["nsenter", f"--net={namespace}"]
        # Into a pipe, ip would write only what fills its buffer.
        command = [*self._enter, "stdbuf", "-oL", "ip", "-o", "monitor", "link", "address", "route", "rule", "netconf", "nsid"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._lines: list[str] = []
        self._marks = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.seen()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)

    def seen(self) -> list[str]:
        """The changes since the last call. A device is made and removed first, and waited for: so all before it has been seen, and a
        monitor that sees nothing fails."""
        self._marks += 1
        name = f"tpmark{self._marks}"

        def is_seen() -> bool:
            for words in (
                ("add", name, "index", _MARK, "type", "veth", "peer", "name", f"{name}p", "index", _PEER),
                ("del", name),
            ):  # again and again: it may not have begun to listen
                subprocess.run([*self._enter, "ip", "link", *words], check=True, capture_output=True, timeout=20)
            return any(name in line for line in self._lines)

        until(is_seen, 20, 0.1)
        lines, self._lines = self._lines, []
        return [line for line in lines if not any(word in line for word in ("tpmark", f"if{_MARK}", f"if{_PEER}"))]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()


@pytest.fixture
def monitors(outside_world: Outside) -> Iterator[list[Monitor]]:
    """Of the outside, which is as the host is to an instance without `egress.uplink`, and of the host itself."""
    made = [Monitor(outside_world.path), Monitor(f"/proc/{os.getpid()}/ns/net")]
    yield made
    for one in made:
        one.close()


def links(instance: Instance) -> set[str]:
    return {path.name for path in (instance.run / instance.name / "netns").iterdir()}


def test_the_hosts_network_stays_as_it_is_when_microvms_come_and_go(
    instance: Instance, app: str, monitors: list[Monitor], outside_world: Outside
) -> None:
    known = {path.name for path in Path("/sys/class/net").iterdir()}
    devices = outside_world.devices()
    before = links(instance)
    vms = [instance.launch(app, idlePolicy=POLICY) for _ in range(3)]
    api = instance.client()
    for vm in vms:
        api.suspend_microvm(microvmIdentifier=vm["microvmId"])
        instance.state(vm["microvmId"], "SUSPENDED")
    guest = Guest(instance, vms[0])
    assert guest.connect(SERVER) == {"heard": f"{UPLINK} hello"}
    instance.kill("vmm")
    until(lambda: api.list_microvms()["items"])
    instance.terminate(vms[1]["microvmId"])
    vms.append(instance.launch(app))
    assert guest.connect(SERVER) == {"heard": f"{UPLINK} hello"}, "by the uplink that the next daemon took over"
    made = links(instance) - before
    assert made
    instance.terminate(*(vm["microvmId"] for vm in vms if vm is not vms[1]))
    until(lambda: made - links(instance))
    outside, host = (monitor.seen() for monitor in monitors)
    assert not outside
    # Others on this host may renew a lease, say; devices and addresses for microVMs have names that were not there.
    assert not [line for line in host if not any(name in line for name in known)]
    assert outside_world.devices() == devices and len(devices) == 1
