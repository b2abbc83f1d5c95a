"""The machine's topology as QEMU's command line: fixed when the image is made, equal for image, standby and session.

Everything a guest is given comes as a descriptor; the process can open nothing by name but what its jail holds. There is
no balloon and no free-page reporting: in a clone they would punch holes into the image's memory (docs/architecture.md).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from gateway.config import Devices

from ..driver import Shape
from ..kernel import PROBE_MIB, PROBE_WORDS, WORDS
from ..network import GUEST_MAC

BINARY = "/usr/bin/qemu-system-x86_64"
AGENT_PORT = "torpor.agent"
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# The leaf of CPUID that tells how long addresses are. `max` has it only as far as svm needs it; a Linux that does not find it takes its own
# addresses of 57 bits for wrong, and writes a row of x for paths in /proc/mounts (copy_from_kernel_nofault).
_ADDRESS_SIZES = 0x80000008
# By accelerator: what guests see now, and what those saw that booted before.
_MODELS = {
    "kvm": ("host,vmx=off,svm=off", "host"),
    "tcg": (f"max,erms=off,svm=off,min-xlevel={_ADDRESS_SIZES:#x}", "max,erms=off"),
}
TRANSLATED = "split-wx=on"  # what is translated lies in memory that is mapped twice: to be written, and to be executed
KERNEL_LINE = f"reboot=t {WORDS}"
# After the machine type, which has a version: an alias means another machine in another QEMU.
MACHINE = "smm=off,vmport=off,sata=off,smbus=off,usb=off,graphics=off,memory-backend=m,suppress-vmdesc=on"
ROOT_PORT = ["-device", "pcie-root-port,id=rp,addr=0x6,chassis=1,slot=1"]
# A guest's flush need not reach the disk: a running session does not outlive its host, and what sleeps was synced by us.
NO_FLUSH = {"no-flush": True}
# Nobody on a link has to hear that the guest is somewhere else now: all links look alike to it.
NIC = {
    "driver": "virtio-net-pci", "netdev": "n0", "id": "vn0", "bus": "rp", "addr": "0x0", "mac": GUEST_MAC, "romfile": "",
    "guest_announce": False,
}  # fmt: skip

THROTTLE = "t1"
STATE_SET = 4  # the descriptor set of Ends.state

_WAITING = ["-S", "-incoming", "defer"]


@dataclass(frozen=True)
class PlaceholderDevices:
    """Open files that a hypervisor that waits has in the place of a session's: a disk of the same size, which is not active, and a tap
    that leads nowhere."""

    disk: int
    tap: int


@dataclass(frozen=True)
class Ends:
    """The hypervisor's ends of what it is talked to by: listening sockets for QMP and the agent, and a file in memory that the
    state of its devices is written to."""

    qmp: int
    agent: int
    state: int

    @property
    def all(self) -> list[int]:
        return [self.qmp, self.agent, self.state]


@dataclass
class Command:
    """A command line and the descriptors it names; `descriptors` must be inherited by the process."""

    arguments: list[str]
    descriptors: list[int] = field(default_factory=list)


def processor(accelerator: str, recorded: str | None = None) -> str:
    """Returns the model that a guest sees: without virtualisation of its own (vmm/processor.py). `recorded`: what is written down of a
    guest that was made before, which keeps the model that it booted with; empty where that was not yet written down."""
    without, before = _MODELS[accelerator]
    return without if recorded is None else recorded or before


def _bare(accelerator: str, model: str, machine: str, memory_mib: int, vcpus: int, backend: str) -> list[str]:
    """Returns the machine without any device, of the type `machine`, with a processor of `model`. `backend`: what its memory is."""
    accel = "kvm" if accelerator == "kvm" else f"tcg,tb-size=64,{TRANSLATED}"
    return [
        BINARY, "-M", f"{machine},{MACHINE}", "-accel", accel, "-cpu", model,
        "-m", str(memory_mib), "-smp", str(vcpus), "-object", f"{backend},id=m,size={memory_mib}M",
        "-nodefaults", "-no-user-config", "-nographic", "-sandbox", SANDBOX,
    ]  # fmt: skip


def _kernel(kernel: int, initrd: int, line: str) -> list[str]:
    return ["-kernel", f"/proc/self/fd/{kernel}", "-initrd", f"/proc/self/fd/{initrd}", "-append", line]


def probe(accelerator: str, kernel: int, initrd: int) -> Command:
    """Returns the machine that shows whether guests run: its init says so on standard output (vmm/probe.py)."""
    bare = _bare(accelerator, processor(accelerator), "q35", PROBE_MIB, 1, "memory-backend-ram")
    return Command([*bare, "-serial", "stdio", *_kernel(kernel, initrd, f"{KERNEL_LINE} {PROBE_WORDS}")], [kernel, initrd])


def _common(shape: Shape, model: str, machine: str, memory: int, share: bool, ends: Ends) -> list[str]:
    backend = f"memory-backend-file,mem-path=/proc/self/fd/{memory},share={'on' if share else 'off'}"
    return [
        *_bare(shape.accelerator, model, machine, shape.memory_mib, shape.vcpus, backend),
        "-global", "migration.send-configuration=off", "-global", "migration.announce-rounds=0",
        "-chardev", f"socket,id=q,fd={ends.qmp},server=on,wait=off", "-mon", "chardev=q,mode=control",
        "-chardev", f"socket,id=c0,fd={ends.agent},server=on,wait=off",
        "-add-fd", f"fd={ends.state},set={STATE_SET}",
        "-device", "virtio-serial-pci,id=vs0,addr=0x7,max_ports=2",
        "-device", f"virtserialport,bus=vs0.0,nr=1,chardev=c0,name={AGENT_PORT}",
    ]  # fmt: skip


def _placeholder(shape: Shape) -> list[str]:
    disk = _block(driver="null-co", node_name="d0", size=shape.disk_bytes, read_zeroes=True)
    return [*disk, *_disk("d0")]


def _disk(node: str) -> list[str]:
    return ["-device", f"virtio-blk-pci,id=vd0,addr=0x4,drive={node}"]


def _network(tap: int) -> list[str]:
    return ["-netdev", f"tap,fd={tap},id=n0", "-device", json.dumps(NIC)]


def _block(**node: object) -> list[str]:
    return ["-blockdev", json.dumps({name.replace("_", "-"): value for name, value in node.items()})]


def _file(set_id: int, read_only: bool) -> dict[str, object]:
    """Returns a node of a file that stays in the page cache when it is activated: a load would drop there what all clones share."""
    return {"driver": "file", "filename": f"/dev/fdset/{set_id}", "read-only": read_only, "drop-cache": False}


def boot(
    shape: Shape, machine: str, memory: int, programs: tuple[int, int] | None, tap: int, ends: Ends, console: int
) -> Command:  # fmt: skip
    """Returns a machine whose memory becomes an image: shared, a NIC from the start, and a placeholder until it is given its disk.
    `programs`: kernel and initramfs; None where it goes on from a boot that was kept."""
    arguments = [
        *_common(shape, processor(shape.accelerator), machine, memory, True, ends),
        *(_kernel(*programs, KERNEL_LINE) if programs is not None else _WAITING),
        *_placeholder(shape),
        *ROOT_PORT,
        *_network(tap),
        "-add-fd", f"fd={console},set=3", "-chardev", "file,id=s0,path=/dev/fdset/3,append=on", "-serial", "chardev:s0",
    ]  # fmt: skip
    return Command(arguments, [memory, *(programs or ()), tap, *ends.all, console])


def boot_disk() -> list[dict[str, object]]:
    """Returns the nodes of a booted machine's disk: what booting writes, in descriptor set 2, over the container's files, in set 1."""
    return [
        {"driver": "raw", "node-name": "base", "read-only": True, "file": _file(1, True)},
        {"driver": "qcow2", "node-name": "d1", "file": _file(2, False), "backing": "base"},
    ]


def disk_limits(devices: Devices) -> dict[str, int]:
    """Returns what of a disk's throttling is not without a bound (ThrottleLimits of QEMU's qapi/block-core.json)."""
    limits = {"bps-total": devices.disk_mib_per_second << 20, "iops-total": devices.disk_operations_per_second}
    return {name: value for name, value in limits.items() if value}


def _limited(node: dict[str, object], limits: dict[str, int]) -> list[str]:
    """Returns a session's disk, `d1`: the node itself, or a filter over it that keeps it within limits."""
    if not limits:
        return _block(node_name="d1", **node)
    group = {"qom-type": "throttle-group", "id": THROTTLE, "limits": limits}
    return [
        "-object", json.dumps(group), *_block(node_name="q1", **node),
        *_block(driver="throttle", node_name="d1", throttle_group=THROTTLE, file="q1", cache=NO_FLUSH),
    ]  # fmt: skip


def standby(
    shape: Shape, recorded: str, machine: str, memory: int, base: int, boot_layer: int, placeholders: PlaceholderDevices, ends: Ends,
    limits: dict[str, int] | None = None,
) -> Command:  # fmt: skip
    """Returns the same machine, waiting for a session: all in place but what the session brings. `recorded`: its processor, as its image's
    manifest has it. `limits`: of its disk."""
    overlay = {**_file(3, False), "cache": NO_FLUSH}
    arguments = [
        *_common(shape, processor(shape.accelerator, recorded), machine, memory, False, ends),
        "-add-fd", f"fd={base},set=1", "-add-fd", f"fd={boot_layer},set=2", "-add-fd", f"fd={placeholders.disk},set=3",
        *_block(driver="raw", node_name="base", read_only=True, file=_file(1, True)),
        *_block(driver="qcow2", node_name="img", read_only=True, file=_file(2, True), backing="base"),
        *_limited({"driver": "qcow2", "cache": NO_FLUSH, "file": overlay, "backing": "img"}, limits or {}),
        *_disk("d1"),
        *ROOT_PORT,
        *_network(placeholders.tap),
        "-serial", "null", *_WAITING,
    ]  # fmt: skip
    return Command(arguments, [memory, base, boot_layer, placeholders.disk, placeholders.tap, *ends.all])
