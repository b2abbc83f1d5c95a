"""`torpor doctor --security`: what stands around microVMs on this host, and what the host itself leaves open."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from gateway import config, confine
from gateway.observe.room import existing

Row = tuple[str, bool, str]


def rows(settings: config.Settings) -> Iterator[Row]:
    from vmm import assets, host_security, host_setup, probe
    from vmm.errors import VmmError
    from vmm.qemu.roots import Roots

    try:
        qemu = Roots(settings.cache).current().version
    except VmmError:
        qemu = ""
    programs = probe.firecracker_programs()
    firecracker = ""
    if programs is not None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # another line of doctor's says that it does not run
            firecracker = probe.version_of(programs.firecracker)
    for one in host_security.findings(Path("/"), os.uname().release, qemu, firecracker, confine.landlock_version(), host_setup.findings()):
        yield f"host: {one.what}", one.is_well, one.text
    place = existing(settings.root)
    lies = host_security.at_rest(Path("/"), settings.root, place.stat().st_dev)
    yield f"host: {lies.what}", lies.is_well, lies.text
    yield from _images(settings)
    for name, why in assets.changed(settings.cache).items():
        yield f"as it was made: {name}", not why, why or f"SHA-256 {assets.recorded(settings.cache)[name]}"
    yield from jails(settings)


def jails(settings: config.Settings) -> Iterator[Row]:
    """Each wall, as the kernel has it around the hypervisors that run here."""
    from vmm import jail, walls_seen

    count, lacking = walls_seen.look(settings)
    seen = f"read back of {count} that run" if count else "none runs here to read it back of"
    for wall in jail.WALLS:
        without = lacking.get(wall.name, [])
        yield f"jail: {wall.name}", not without, f"not around {', '.join(without)}" if without else f"{wall.text} ({seen})"
    for text in lacking.get("", []):
        yield "jail", False, text


def _images(settings: config.Settings) -> Iterator[Row]:
    from vmm import upgrades

    from .repair import known, named_of

    try:
        seeing = upgrades.virtualising(settings, *named_of(known(settings.control_dir / "torpor.db")))
    except config.ConfigError as error:
        seeing = str(error)
    if seeing:
        yield "guests' processors", False, seeing
    else:
        yield "guests' processors", True, "no image here was made with a processor that offers its guests virtualisation"
