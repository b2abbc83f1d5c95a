"""Which hypervisor an instance runs, put together from its settings."""

from __future__ import annotations

from gateway.config import Settings

from . import probe
from .cgroups import Cgroups
from .driver import Driver
from .firecracker.driver import Assets as FirecrackerAssets
from .firecracker.driver import FirecrackerDriver
from .network import Network
from .qemu.driver import Assets as QemuAssets
from .qemu.driver import QemuDriver
from .sandboxes import SandboxAllocator


def choose(settings: Settings, hypervisor: str, cgroups: Cgroups, network: Network) -> Driver:
    """`hypervisor` is one that the probe found to work."""
    cache = settings.cache
    sandboxes = SandboxAllocator(settings.runtime / "vms", cgroups, settings.users.machines)
    if hypervisor != "firecracker":
        return QemuDriver(QemuAssets(cache), settings.root / "boots", sandboxes, cgroups, network)
    programs = probe.firecracker_programs()
    assert programs is not None
    return FirecrackerDriver(programs, FirecrackerAssets(cache), settings.root / "jails", sandboxes, cgroups)
