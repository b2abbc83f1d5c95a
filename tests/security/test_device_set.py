"""The wall that is not there to be broken: what a guest has no device for, no guest reaches in its hypervisor.

The exact devices of a microVM's machine, asked of QEMU; with the positive control of a machine that QEMU makes by itself.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gateway.messages import Shape
from vmm import memory, network
from vmm.qemu import machine as topology
from vmm.qemu.process import listen

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a tap is root's to make")
SHAPE = Shape(memory_mib=64, vcpus=1, disk_bytes=1 << 20, accelerator="tcg", baseline_mib=64)
# By vendor and device: virtio's disk and console, a port for the link, the bridge of q35 with its legacy devices, and its host bridge. What is
# behind the port is seen when a guest has numbered its bus.
PCI = [(0x1AF4, 0x1001), (0x1AF4, 0x1003), (0x1B36, 0x000C), (0x8086, 0x2918), (0x8086, 0x29C0)]
GIVEN = {"pcie-root-port", "virtio-blk-pci", "virtio-net-pci", "virtio-serial-pci", "virtserialport"}
# What q35 is made of; of newer QEMUs some is left out, and nothing is added.
BOARD = {
    "System", "memory-region", "irq", "max-x86_64-cpu", "ICH9-LPC", "hpet", "i8042", "i8257", "isa-i8259", "isa-pit", "isa-pcspk",
    "isa-serial", "kvmvapic", "mc146818rtc", "port92",
}  # fmt: skip


def asked(sock: socket.socket, *questions: dict[str, Any]) -> list[Any]:
    """What QMP answers, without events."""
    found = []
    with sock, sock.makefile("rw") as file:
        file.readline()
        for question in ({"execute": "qmp_capabilities"}, *questions):
            file.write(json.dumps(question) + "\n")
            file.flush()
            while "event" in (answer := json.loads(file.readline())):
                pass
            found.append(answer.get("return", answer))
    return found[1:]


def functions(buses: list[dict[str, Any]]) -> list[tuple[int, int]]:
    found = []
    for bus in buses:
        for device in bus["devices"]:
            found.append((device["id"]["vendor"], device["id"]["device"]))
            if inner := device.get("pci_bridge", {}).get("devices"):
                found += functions([{"devices": inner}])
    return found


def run(tmp_path: Path, command: list[str], descriptors: list[int], *questions: dict[str, Any]) -> list[Any]:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors, stderr=subprocess.PIPE) as process:
        try:
            one = socket.socket(socket.AF_UNIX)
            one.settimeout(60)
            one.connect(str(tmp_path / "qmp.sock"))
            return asked(one, *questions)
        finally:
            process.kill()


def test_a_microvm_has_these_devices_and_no_others(tmp_path: Path) -> None:
    with listen(tmp_path / "qmp.sock") as qmp, listen(tmp_path / "agent.sock") as agent, open(tmp_path / "console", "ab") as console:
        tap, ram, state = network.open_placeholder_tap(), memory.new_memory("devices", SHAPE.memory_mib << 20), memory.write_only("state")
        ends = topology.Ends(qmp.fileno(), agent.fileno(), state)
        command = topology.boot(SHAPE, "q35", ram, None, tap, ends, console.fileno())
        buses, scsi, ours, anonymous, board = run(
            tmp_path, command.arguments, command.descriptors, {"execute": "query-pci"},
            {"execute": "qom-get", "arguments": {"path": "/machine/peripheral/vd0/virtio-backend", "property": "scsi"}},
            *({"execute": "qom-list", "arguments": {"path": f"/machine/{path}"}} for path in ("peripheral", "peripheral-anon", "unattached")),
        )  # fmt: skip
        for descriptor in (tap, ram, state):
            os.close(descriptor)
    assert sorted(functions(buses)) == PCI
    assert kinds(ours) | kinds(anonymous) == GIVEN
    assert scsi is False or "error" in scsi, "no SCSI passes to a disk (CVE-2026-48914)"
    assert kinds(board) <= BOARD


def kinds(entries: list[dict[str, str]]) -> set[str]:
    return {one["type"].removeprefix("child<").removesuffix(">") for one in entries if one["type"].startswith("child<")}


def test_a_machine_that_qemu_makes_by_itself_has_more(tmp_path: Path) -> None:
    with listen(tmp_path / "qmp.sock") as qmp:
        command = [
            topology.BINARY, "-M", "q35", "-m", "64", "-S", "-display", "none", "-serial", "none", "-monitor", "none",
            "-chardev", f"socket,id=q,fd={qmp.fileno()},server=on,wait=off", "-mon", "chardev=q,mode=control",
        ]  # fmt: skip
        buses, unattached = run(
            tmp_path,
            command,
            [qmp.fileno()],
            {"execute": "query-pci"},
            {"execute": "qom-list", "arguments": {"path": "/machine/unattached"}},
        )
    assert set(functions(buses)) > set(PCI) - {(0x1AF4, 0x1001), (0x1AF4, 0x1003), (0x1B36, 0x000C)}
    assert kinds(unattached) - BOARD >= {"vmport", "vmmouse", "e1000e", "ich9-ahci", "ICH9-SMB"}
