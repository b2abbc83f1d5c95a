"""Which hypervisor an instance runs, put together from its settings."""

from __future__ import annotations

from gateway.config import Settings

from . import assets, probe
from .cgroups import Cgroups
from .driver import Driver, VmmError
from .firecracker.driver import Assets as FirecrackerAssets
from .firecracker.driver import FirecrackerDriver
from .firecracker.jail import Programs
from .kernel import AssetError
from .network import Network
from .places import Places
from .qemu.driver import Assets as QemuAssets
from .qemu.driver import QemuDriver


def choose(settings: Settings, hypervisor: str, cgroups: Cgroups, network: Network) -> Driver:
    """Raises VmmError when what Firecracker needs cannot be made."""
    cache = settings.cache
    places = Places(settings.runtime / "vms", cgroups, settings.users.machines)
    if hypervisor != "firecracker":
        made_of = QemuAssets(cache / "qemu-root", cache / "kernel/vmlinuz", cache / "initrd")
        return QemuDriver(made_of, settings.root / "boots", places, cgroups, network)
    programs = probe.firecracker_programs()
    assert programs is not None
    try:
        assets.make_firecracker(cache)
    except AssetError as error:
        raise VmmError(str(error)) from error
    made = FirecrackerAssets(cache / "vmlinux", cache / "initrd-firecracker")
    return FirecrackerDriver(Programs(*programs), made, settings.root / "jails", places, cgroups)
