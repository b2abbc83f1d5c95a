"""serve, env, doctor, version: the commands for the host."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from gateway import config, instance, listeners, own_walls, status
from gateway.observe import log
from gateway.observe.room import (
    BUILD_INODES,
    SESSION_DESCRIPTORS,
    allow_descriptors,
    descriptors_kept,
    disk_free_bytes,
    existing,
    inodes_free,
    memory_available_bytes,
)  # fmt: skip

from .output import console, errors, fail, no_instance, show_json, show_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.probe import Choice

    from .repair import Known

Root = Annotated[Path | None, typer.Option("--root", help="The instance's directory.")]
Name = Annotated[str | None, typer.Option("--name", help="The instance's name.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_RELOAD_SECONDS = 60.0
_FEW = 16
_SYSTEM_AUTHORITIES = Path("/usr/local/share/ca-certificates")
_PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils", "mmdebstrap": "mmdebstrap",
    "slirp4netns": "slirp4netns", "musl-gcc": "musl-tools", "mkfs.ext4": "e2fsprogs", "nft": "nftables", "ip": "iproute2",
    "unshare": "util-linux", "setpriv": "util-linux",
}  # fmt: skip


def register(app: typer.Typer) -> None:
    app.command()(serve)
    app.command()(reload)
    app.command()(trust)
    app.command()(env)
    app.command()(doctor)
    app.command()(version)
    app.command()(assets)


def serve(
    root: Root = None,
    name: Name = None,
    adopt: Annotated[bool, typer.Option("--adopt", help="Take images and sessions that the store does not know as they are.")] = False,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="Set images and sessions aside that the store does not know.")] = False,
) -> None:
    """Run the service until it is told to stop.

    Example: torpor serve --root /var/lib/torpor
    """
    if adopt and quarantine:
        fail("--adopt and --quarantine are two ways on: choose one", 2)
    strangers = "adopt" if adopt else "quarantine" if quarantine else None
    from gateway import process, supervisor
    from vmm.assets import AssetError, Base, make

    if os.geteuid() != 0:
        fail("serve needs root: it makes network namespaces, mounts and users' processes", 2)
    os.umask(0o022)  # users of the service's own read what root makes here
    process.show_stacks()
    allow_descriptors()
    try:
        settings = config.load(root=root, name=name, strangers=strangers)
    except config.ConfigError as error:  # torpor.service: 2 stays wrong, 1 is tried again
        fail(str(error), 1 if isinstance(error.__cause__, OSError) else 2)
    log.configure("torpor")
    try:
        make(settings.cache, lambda text: errors.print(f"torpor: {text}"), Base.of(settings.images))
    except AssetError as error:
        fail(str(error))

    def announce(started: config.Settings) -> None:
        console.print(f"torpor: serving API {instance.api_url(started)}, endpoints on port {started.edge.port}")
        for variable, value in instance.environment(started).items():
            console.print(f"export {variable}={value}", soft_wrap=True)

    asyncio.run(supervisor.serve(settings, announce))


def reload(root: Root = None, name: Name = None) -> None:
    """Replace the edge's workers one by one, without a failed request: new code, new settings of theirs.

    Example: torpor reload
    """
    from vmm.syscalls import signal_process

    settings = config.load(root=root, name=name)
    path, began = status.state_file(settings), time.time()

    def workers(state: status.State) -> set[int]:
        return {process.pid for process in state.processes if process.serves and process.name.startswith("edge")}

    try:
        known = status.read_state(path)
        before = workers(known)
        if not signal_process(known.pid, known.started, signal.SIGHUP):
            raise ProcessLookupError
    except (OSError, ValueError):
        fail(f"instance {settings.name} is not served here: start it with `torpor serve`", 1)
    deadline = time.monotonic() + _RELOAD_SECONDS
    while workers(state := status.read_state(path)) & before:
        if state.failed_at >= began:
            fail(f"workers were not replaced, and those that served go on: {state.failure}", 1)
        if time.monotonic() > deadline:
            fail(f"workers were not replaced within {_RELOAD_SECONDS:g} s: the service's log says why", 1)
        time.sleep(0.05)


def trust(root: Root = None, name: Name = None, remove: Annotated[bool, typer.Option(help="Take it out again.")] = False) -> None:
    """Add this instance's development certificate authority to the system's, for browsers and other programs.

    Example: torpor trust
    """
    settings = config.load(root=root, name=name)
    authority, target = settings.tls_dir / "ca.crt", _SYSTEM_AUTHORITIES / f"torpor-{settings.name}.crt"
    if os.geteuid() != 0:
        fail("trust needs root: it changes the system's certificate authorities", 2)
    if not remove and not authority.is_file():
        no_instance(settings.root)
    if remove and not target.exists():
        fail(f"{target} is not there: nothing was removed", 1)
    if remove:
        target.unlink()
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(authority, target)
    done = subprocess.run(["update-ca-certificates"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        fail(f"update-ca-certificates: {done.stderr.strip()}", 1)
    errors.print(f"torpor: {target} {'removed' if remove else 'added'}", soft_wrap=True)
    for line in _own_lists(settings.name, authority, remove):
        errors.print(line, soft_wrap=True)


def _own_lists(name: str, authority: Path, remove: bool) -> list[str]:
    """Returns what to do for browsers, which do not ask the system for its authorities on Linux."""
    list_of_nss = "-d sql:$HOME/.pki/nssdb"
    words = f"-D {list_of_nss} -n torpor-{name}" if remove else f"-A {list_of_nss} -t C,, -n torpor-{name} -i {authority}"
    return [
        "Chromium and Chrome keep a list of their own, for each user (certutil is in libnss3-tools):",
        f"  certutil {words}",
        f"Firefox too: in its settings, Certificates, {f'delete Torpor development CA ({name})' if remove else f'import {authority}'}",
    ]


def env(root: Root = None, name: Name = None) -> None:
    """Print the exports that make aws, boto3, curl and torpor work with this instance.

    Example: eval "$(torpor env)"
    """
    settings = config.load(root=root, name=name)
    if not (settings.aws_dir / "config").exists():
        no_instance(settings.root)
    for variable, value in instance.environment(settings).items():
        print(f"export {variable}={value}")


def assets() -> None:
    """Make what the host needs once: guest kernel, initramfs, hypervisors' root, base image, builder's root.

    Example: torpor assets
    """
    from vmm.assets import AssetError, Base, make

    os.umask(0o022)  # hypervisors' users read what is made here
    settings = config.load()
    try:
        make(settings.cache, lambda text: errors.print(f"torpor: {text}"), Base.of(settings.images))
    except AssetError as error:
        fail(str(error))


def _free(settings: config.Settings, place: Path) -> list[tuple[str, bool, str]]:
    disk, inodes, memory = disk_free_bytes(place) >> 20, inodes_free(place), memory_available_bytes() >> 20
    return [
        ("disk", disk > settings.limits.disk_reserve_mib, f"{disk} MiB free below {place}"),
        ("inodes", inodes >= BUILD_INODES, f"{inodes} free below {place}" if inodes < 1 << 60 else "without a bound"),
        ("memory", memory > settings.limits.reserve_mib, f"{memory} MiB available, {settings.limits.reserve_mib} MiB kept back"),
    ]


def _layers(mib: int) -> tuple[str, bool, str]:
    if mib and not Path("/dev/loop-control").exists():
        return "layers of builds", False, "no loop device: builds fail. modprobe loop, or images.store_mib = 0: no bound"
    return "layers of builds", True, f"{mib} MiB of each account at most" if mib else "without a bound (images.store_mib)"


def edge_port(kept: Path) -> tuple[str, bool, str]:
    port = listeners.kept_port(kept)
    if not port:
        return "edge port", True, "chosen at the next start"
    holder = listeners.holder(port)
    return "edge port", True, f"{port}, held by {holder}" if holder else f"{port}, free"


def kept_ready(standbys: config.Standbys, hypervisor: str) -> int:
    """Returns the descriptors of what vmm may keep ready for launches of one image that is in great demand. A hypervisor of Firecracker's
    waits in a link of its own; QEMU's take theirs when they are needed."""
    from vmm.network import LINK_DESCRIPTORS, MOST_LINKS
    from vmm.standbys import STANDBY_DESCRIPTORS

    each = STANDBY_DESCRIPTORS + (LINK_DESCRIPTORS if hypervisor == "firecracker" else 0)
    return max(standbys.links, MOST_LINKS) * LINK_DESCRIPTORS + standbys.most_per_image * each


def _descriptors(settings: config.Settings, hypervisor: str) -> tuple[bool, str]:
    """Returns what one process may have against what vmm keeps ready for launches, and for microVMs."""
    allow_descriptors()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    ready = kept_ready(settings.standbys, hypervisor)
    microvms = (limit - ready - descriptors_kept()) // SESSION_DESCRIPTORS
    if microvms < _FEW:
        return False, f"{limit} for a process: {ready} may be kept ready for launches, and few microVMs can run beside: raise LimitNOFILE"
    return True, f"{limit} for a process: enough for {microvms} microVMs that run, and {limit // 2} requests at one edge"


def _groups(settings: config.Settings, place: Path) -> tuple[bool, str]:
    """Whether control groups limit microVMs, and what they limit."""
    from vmm.cgroups import Cgroups

    groups = Cgroups(settings.name, settings.root)
    problems = [*(f"missing: {name}" for name in groups.missing), *groups.problems()]
    if problems:
        return False, "; ".join(problems)
    if groups.unlimited_disk:
        return True, f"memory, cpu and pids are limited; io is not: {place} lies on no disk of which the kernel gives out parts"
    return True, "memory, cpu, io and pids are limited"


def _own_groups(settings: config.Settings) -> tuple[bool, str]:
    """What bounds the memory of the service's own processes. One bound is enough to be well."""
    from vmm.own_groups import OwnGroups

    own = own_walls.memory_bound(settings) >> 20
    if why := OwnGroups(settings.name).why_not:
        return True, f"{own} MiB each by RLIMIT_DATA, which vmm has not; no control groups: {why}"
    return True, f"{own} MiB each, and {own_walls.group_bound('control', settings) >> 20} MiB with what they start, by control groups"


def doctor(
    root: Root = None,
    name: Name = None,
    repair: Annotated[bool, typer.Option("--repair", help="Remove what a crash left behind; the service must be stopped.")] = False,
    security: Annotated[bool, typer.Option("--security", help="Check what keeps tenants apart, instead: host, versions, jails.")] = False,
    inside: Annotated[str, typer.Option("--inside", help="A microVM, with a shell, in which a program tries what must be refused.")] = "",
    as_json: Json = False,
) -> None:
    """Check the host: programs, acceleration, control groups, room, ports, and what a crash left behind.

    Example: torpor doctor --repair
    """
    from vmm import assets, base, leftovers, making, probe

    from . import quarantine
    from .repair import is_served, known, leftovers_of
    from .security import rows as walls

    settings = config.load(root=root, name=name)
    if inside:
        from .inside import rows as tries

        return _checked(list(tries(inside)), as_json)
    if security:
        return _checked(list(walls(settings)), as_json)
    rows: list[tuple[str, bool, str]] = []
    for program, package in _PROGRAMS.items():
        found = shutil.which(program)
        rows.append((program, found is not None, found or f"missing: apt-get install {package}"))
    place = existing(settings.root)  # there may be no instance yet
    accelerator, hypervisor = probe.choose(settings)
    for check, choice in (("acceleration", accelerator), ("hypervisor", hypervisor)):
        rows.append((check, choice.works, f"{choice.what}: {choice.why}"))
    rows += [("limits of links", False, text)] if (text := probe.why_not_limited(settings, hypervisor.what)) else []
    rows += _kvm(settings, accelerator, hypervisor)
    memory, vcpus = settings.limits.guest_mib or probe.memory_cap_mib(), os.cpu_count()
    rows.append(("guest peak", True, f"capped at {memory} MiB and {vcpus} virtual CPUs by this host"))
    rows.append(("control groups", *_groups(settings, place)))
    rows.append(("memory of the service", *_own_groups(settings)))
    for what, is_missing in assets.missing(settings.cache, assets.Base.of(settings.images)).items():
        text = "missing, or made by another version: run `torpor assets`" if is_missing else str(settings.cache)
        if what == "base.tar" and not is_missing:
            text = f"{base.described(making.key_at(settings.cache / what))}, in {settings.cache}"
        rows.append((f"asset {what}", not is_missing, text))
    rows += [*_free(settings, place), _layers(settings.images.store_mib)]
    rows.append(("descriptors", *_descriptors(settings, hypervisor.what)))
    kept = settings.root / "edge-port"
    if kept.exists():
        rows.append(edge_port(kept))
    try:
        store = known(settings.control_dir / "torpor.db")
        rows += _stored(settings, store)
    except config.ConfigError as error:  # then nothing is known to be left over, either
        store = None
        rows.append(("store", False, str(error)))
    rows += quarantine.rows(settings)
    if repair and is_served(settings):
        fail(f"instance {settings.name} is served: it mends what it finds at its start; stop it to repair by hand", 1)
    if is_served(settings):
        rows += [(f"process {name}", *found) for name, found in status.checks(status.state_file(settings), time.time()).items()]
    for leftover in leftovers_of(settings, store) if store is not None else []:
        if repair:
            leftovers.mend(settings, leftover)
            errors.print(f"torpor: removed {leftover.kind} {leftover.what}: {leftover.why}", soft_wrap=True)
        else:
            rows.append((f"left over: {leftover.kind}", False, f"{leftover.what}: {leftover.why}; torpor doctor --repair removes it"))
    _checked(rows, as_json)


def _checked(rows: list[tuple[str, bool, str]], as_json: bool) -> None:
    """Shows them; the process ends with status 1 where one is not well."""
    if as_json:
        show_json([{"check": check, "ok": ok, "text": text} for check, ok, text in rows])
    else:
        show_table(("", "check", ""), [(Text("ok", "green") if ok else Text("no", "red"), check, text) for check, ok, text in rows])
    if not all(ok for _, ok, _ in rows):
        raise typer.Exit(1)


def _kvm(settings: config.Settings, accelerator: Choice, hypervisor: Choice) -> Iterator[tuple[str, bool, str]]:
    """Returns what doctor says of KVM: what is done where it does not work, and of a host where it does, whether that is as recommended. A
    recommendation fails no check."""
    from vmm import host_setup, kvm_device, probe

    works = accelerator.what == "kvm" and accelerator.works
    if not works:
        if settings.accelerator != "tcg":
            yield "host: kvm", accelerator.works, kvm_device.cure(probe.KVM)
        return
    for one in host_setup.findings():
        yield f"host: {one.what}", True, f"as recommended: {one.text}" if one.is_well else f"recommended otherwise: {one.text}"
    if settings.hypervisor != "qemu" and (programs := probe.firecracker_programs()) is not None:
        yield from _jailer(settings, [programs.firecracker, programs.jailer], hypervisor.what == "firecracker")


def _jailer(settings: config.Settings, programs: list[Path], is_used: bool) -> Iterator[tuple[str, bool, str]]:
    """Returns what doctor says of a host that has Firecracker's programs and KVM."""
    from vmm import disks, host_setup

    place = existing(settings.root)
    if os.statvfs(place).f_flag & os.ST_NODEV:
        yield "host: jailer", not is_used, f"its device nodes are none below {place}, which is mounted nodev: move ROOT, or mount it dev"
    if not is_used:
        return
    with contextlib.suppress(OSError):  # there is no room, or no right, of which other lines tell
        if not disks.shares_blocks(place):
            yield "host: disks", True, f"{settings.root}: {disks.COPIED}"
    replaceable = host_setup.replaceable([*programs, settings.root])
    for path in replaceable:
        yield "host: jailer", False, f"others than root may write {path}, which Firecracker's jailer trusts: chown root, chmod go-w"
    if not replaceable:
        yield "host: jailer", True, "as recommended: root alone may write the programs and directories that it trusts"


def _stored(settings: config.Settings, store: Known) -> Iterator[tuple[str, bool, str]]:
    """Returns what doctor says of the store against the disks."""
    from vmm.errors import VmmError

    from .repair import away_of, missing_of, strangers_of, upgrades_of

    try:
        yield from upgrades_of(settings, store) if settings.images_dir.is_dir() else []
    except (OSError, VmmError) as error:
        yield "old images", False, f"cannot be told: {error}"
    yield from missing_of(settings, store)
    yield from strangers_of(settings, store)
    yield from away_of(settings, store)
    for row in store.set_aside:
        yield f"set aside: {row.kind}", False, f"{row.key}: its row in the store cannot be read: {row.reason}; its files are kept"


def version(as_json: Json = False) -> None:
    """Print the version; with --json also the SHA-256 of what was made here: kernel, initramfs, agent (guest), base image, roots.

    Example: torpor version
    """
    from vmm import assets

    number = importlib.metadata.version("torpor")
    show_json({"version": number, "assets": assets.recorded(config.load().cache)}) if as_json else print(number)
