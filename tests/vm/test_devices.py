"""What a hypervisor gives a microVM beside memory: limits of its devices, randomness, figures; and which processor. By the rig of
test_drivers.py: QEMU for real, Firecracker by its contract, or for real too."""

from __future__ import annotations

import asyncio
import dataclasses
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_drivers import Life, Rig, life, programs, spawned

from gateway.config import Devices
from vmm import disks, manifest, processor
from vmm.driver import Machine
from vmm.errors import Refused
from vmm.firecracker import limits
from vmm.firecracker.api import Api, ApiError
from vmm.firecracker.driver import FirecrackerDriver
from vmm.firecracker.machine import FirecrackerMachine
from vmm.qemu import machine as topology
from vmm.qemu.driver import QemuDriver
from vmm.qemu.process import QemuMachine

__all__ = ["life", "programs"]  # fixtures
pytestmark = pytest.mark.vm
LIMITS = Devices(disk_mib_per_second=10, disk_operations_per_second=500, network_mib_per_second=5)


def limited(driver: Any, devices: Devices) -> Any:
    """Another daemon's, whose settings say so."""
    if isinstance(driver, QemuDriver):
        driver._disk_limits = topology.disk_limits(devices)
    else:
        assert isinstance(driver, FirecrackerDriver)
        driver._devices = devices
    return driver


async def of(machine: object) -> dict[str, object]:
    """The limits that a hypervisor has."""
    if isinstance(machine, QemuMachine):
        try:
            found = await machine.qmp.run("qom-get", path=f"/objects/{topology.THROTTLE}", property="limits")
        except Exception:
            return {}
        return {name: value for name, value in found.items() if value and name.endswith("-total")}
    assert isinstance(machine, FirecrackerMachine)
    said = await machine.api.call("GET", "/vm/config")
    assert said["mmds-config"] is None, "there is a metadata service in the guest's network that is not ours"
    assert said["entropy"]["rate_limiter"]["bandwidth"]["size"] == limits.ENTROPY_BYTES
    (disk,), (link,) = said["drives"], said["network-interfaces"]
    found = {"disk": disk.get("rate_limiter"), "in": link.get("rx_rate_limiter"), "out": link.get("tx_rate_limiter")}
    return {name: {kind: one["size"] for kind, one in value.items() if one} for name, value in found.items() if value}


LIMITED: dict[str, dict[str, object]] = {
    "qemu": {"bps-total": 10 << 20, "iops-total": 500},
    "firecracker": {"disk": {"bandwidth": 10 << 20, "ops": 500}, "in": {"bandwidth": 5 << 20}, "out": {"bandwidth": 5 << 20}},
}


@pytest.mark.parametrize("kind", ["qemu", "firecracker"])
def test_limits_of_devices_are_those_of_the_settings_at_each_load(kind: str, life: Life) -> None:
    async def loads(one: Rig) -> None:
        """A launch with limits, a resume without, and one with them again: what a state brings of them counts for nothing."""
        source = one.image
        for incarnation, devices in enumerate((LIMITS, Devices(), LIMITS), 1):
            one.driver = limited(one.make(), devices)
            machine = await (one.launched("first") if incarnation == 1 else one.prepared("first", incarnation, source))
            assert await of(machine) == (LIMITED[kind] if devices is LIMITS else {})
            (await one.woken(machine)).close()
            source = await one.saved(machine)
            await machine.kill()

    life(loads, kind)


def test_what_firecracker_counts_is_read_when_it_is_saved(life: Life) -> None:
    async def counted(one: Rig) -> None:
        """Also by a daemon that takes the process over."""
        machine = await one.launched("first")
        (await one.woken(machine)).close()
        await one.saved(machine)
        await machine.kill()
        before = dict(one.driver.counts())
        assert before["channel_received_bytes"] > 0 and before["channel_sent_bytes"] > 0, before
        assert "mmds_packets" not in before and "system_calls_refused" not in before
        second = await one.launched("second")
        (await one.woken(second)).close()
        other = one.make()
        adopted = await other.adopt(next(record for record in other.records() if record.session == "second"))
        assert adopted is not None and other.counts() == {}
        one.driver = other
        await one.saved(adopted)
        async with asyncio.timeout(10):
            while not other.counts().get("channel_received_bytes"):
                await asyncio.sleep(0.01)
        await adopted.kill()
        await second.wait()

    life(counted, "firecracker")


def test_a_standby_of_firecracker_waits_in_the_link_that_becomes_its_sessions(life: Life) -> None:
    async def waits(one: Rig) -> None:
        """And it is loaded there. One that nobody takes gives its link back, and a session that kept its own has a process in that."""
        one.driver = one.make()
        assert isinstance(one.driver, FirecrackerDriver)
        one.driver._network = one.network
        machine = await one.driver.standby(one.image)
        link = machine.take_link()
        assert link is not None and machine.take_link() is None and namespace_of(machine) == link.path.stat().st_ino
        pid = machine.record.pid
        overlay = one.snapshots.overlay("first")
        overlay.parent.mkdir(parents=True)
        disks.copy_overlay(one.image / one.driver.disk_template, overlay)
        machine.record.session, machine.record.incarnation = "first", 1
        await machine.prepare(one.image, overlay, link)
        (await one.woken(machine)).close()
        assert machine.record.pid == pid and machine.record.link == link.name
        snapshot = await one.saved(machine)
        await machine.kill()
        assert link.path.exists(), "its session may have kept it"

        unused = await one.driver.standby(one.image)
        assert unused.own_link is not None
        path = unused.own_link.path
        await unused.kill()
        assert not path.exists()

        again = await one.driver.standby(one.image, link)
        assert again.take_link() is None and namespace_of(again) == link.path.stat().st_ino
        again.record.session, again.record.incarnation = "first", 2
        await again.prepare(snapshot, overlay, link)
        (await one.woken(again)).close()
        await again.kill()
        await one.network.release(link)

    life(waits, "firecracker")


def namespace_of(machine: Machine) -> int:
    return Path(f"/proc/{machine.record.pid}/ns/net").stat().st_ino


def test_devices_are_configured_before_the_guest_and_by_what_firecracker_knows(life: Life) -> None:
    async def refused(one: Rig) -> None:
        bucket = {"size": 1, "refill_time": 1}
        fresh = await spawned(one)  # which has its pipe
        before: list[tuple[str, str, dict[str, Any], str]] = [
            ("PUT", "/metrics", {"metrics_path": "/counts"}, "Reinitialization of metrics not allowed"),
            ("PUT", "/entropy", {"limiter": {}}, "unknown field `limiter`"),
            ("PUT", "/entropy", {"rate_limiter": {"bytes": bucket}}, "unknown field `bytes`"),
            ("PUT", "/entropy", {"rate_limiter": {"bandwidth": {"size": 1}}}, "missing field `refill_time`"),
            ("PUT", "/actions", {"action_type": "FlushMetrics"}, "not supported before starting"),
            ("PATCH", "/drives/disk", {"drive_id": "disk", "rate_limiter": {"ops": bucket}}, "not supported before starting"),
            ("PATCH", "/network-interfaces/net0", {"iface_id": "net1"}, "does not match the id from the body"),
        ]
        await refuses(fresh.api, before)
        await fresh.api.put("/entropy")
        with pytest.raises(ApiError, match="not allowed after configuring"):
            await fresh.api.put("/snapshot/load", snapshot_path="/x", mem_backend={"backend_type": "File", "backend_path": "/y"})
        await fresh.kill()
        machine = await one.launched("first")
        assert isinstance(machine, FirecrackerMachine)
        after: list[tuple[str, str, dict[str, Any], str]] = [
            ("PUT", "/metrics", {"metrics_path": "/counts"}, "not supported after starting"),
            ("PUT", "/entropy", {}, "not supported after starting"),
            ("PATCH", "/drives/other", {"drive_id": "other", "rate_limiter": {"ops": bucket}}, "/drives/other: ."),
        ]
        await refuses(machine.api, after)
        await machine.kill()

    life(refused, "firecracker")


async def refuses(api: Api, calls: list[tuple[str, str, dict[str, Any], str]]) -> None:
    for method, path, body, words in calls:
        with pytest.raises(ApiError, match=words):
            await api.call(method, path, body)


@pytest.mark.parametrize("kind", ["qemu", "firecracker"])
def test_what_was_made_on_another_processor_is_refused_and_not_lost(kind: str, life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "qemu" and life.shape.accelerator != "kvm":
        pytest.skip("emulated guests see no processor of the host's")
    monkeypatch.setattr("vmm.processor.lent", lambda: ["1.0.ECX=7"])  # of Firecracker's; the stand-in's host may have no KVM

    async def moved(one: Rig) -> None:
        """An image and a sleeper, on a host of another model, on one that lacks a feature, and on their own again."""
        machine = await one.launched("first")
        (await one.woken(machine)).close()
        snapshot = await one.saved(machine)
        await machine.kill()
        made, ours = manifest.read(one.image, kind).made, one.driver
        assert made.model == processor.model() != "" and made.features
        monkeypatch.setattr("vmm.processor.model", lambda root=Path("/"): "GenuineIntel family 6 model 85")
        one.driver = one.make()
        with pytest.raises(Refused, match=f"another model .{made.model}; this host's is GenuineIntel family 6 model 85"):
            await one.prepared("first", 2, snapshot)
        monkeypatch.undo()
        if kind == "firecracker":
            monkeypatch.setattr("vmm.processor.lent", lambda: ["1.0.ECX=3"])
            one.driver = one.make()
            with pytest.raises(Refused, match=r"features that this one has not .CPUID 1\.0\.ECX=7"):
                await one.prepared("first", 2, snapshot)
        one.driver = ours
        again = await one.prepared("first", 2, snapshot)
        (await one.woken(again)).close()
        await again.kill()

    dataclasses.replace(life, shape=msgspec.structs.replace(life.shape, accelerator="kvm"))(moved, kind)


@pytest.fixture
def nothing_locked() -> Iterator[None]:
    """The host lets nobody lock memory."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


@pytest.mark.usefixtures("nothing_locked")
@pytest.mark.parametrize("kind", ["qemu", "firecracker"])
def test_no_hypervisor_locks_memory_or_asks_for_huge_pages(kind: str, life: Life) -> None:
    async def looked_at(one: Rig) -> None:
        machine = await one.launched("first")
        (await one.woken(machine)).close()
        process = Path(f"/proc/{machine.record.pid}")
        (limit,) = [line.split()[3] for line in (process / "limits").read_text().splitlines() if line.startswith("Max locked memory")]
        assert limit == "0"
        facts = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        assert facts["VmLck"].split() == facts["VmPin"].split() == facts["HugetlbPages"].split() == ["0", "kB"]
        await one.saved(machine)
        await machine.kill()

    life(looked_at, kind)
