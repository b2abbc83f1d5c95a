"""Which hypervisor an instance runs, put together from its settings."""

from __future__ import annotations

import contextlib

import structlog

from gateway.config import Settings

from . import disks, probe
from .cgroups import Cgroups
from .driver import Driver
from .firecracker.driver import Assets as FirecrackerAssets
from .firecracker.driver import FirecrackerDriver
from .network import Network
from .qemu.driver import Assets as QemuAssets
from .qemu.driver import QemuDriver
from .sandboxes import SandboxAllocator

log = structlog.get_logger()


def choose(settings: Settings, hypervisor: str, cgroups: Cgroups, network: Network) -> Driver:
    """`hypervisor` is one that the probe found to work."""
    cache = settings.cache
    sandboxes = SandboxAllocator(settings.runtime / "vms", cgroups, settings.users.machines)
    if hypervisor != "firecracker":
        return QemuDriver(QemuAssets(cache), settings.root / "boots", sandboxes, cgroups, network, settings.devices)
    programs = probe.firecracker_programs()
    assert programs is not None
    with contextlib.suppress(OSError):  # a full disk is told of by others
        if not disks.shares_blocks(settings.root):
            log.warning("disks.copied", root=str(settings.root), text=disks.COPIED)
    return FirecrackerDriver(programs, FirecrackerAssets(cache), settings.root / "jails", sandboxes, cgroups, settings.devices, network)
