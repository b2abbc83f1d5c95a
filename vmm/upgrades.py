"""What an update of the host leaves behind: images and sleepers of an older hypervisor, kernel or agent than new ones get."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import msgspec

from gateway.config import Settings
from gateway.messages import AGENT_PROTOCOL

from . import diffs, kernel, manifest, processor, seals
from .diffs import MANIFEST as SNAPSHOT_MANIFEST
from .errors import VmmError
from .manifest import Manifest
from .provenance import Provenance
from .qemu import roots
from .qemu.roots import Root, Roots, why_refused

_NAMED = 5  # in one line
_REBUILD = "`torpor images --rebuild-old` makes new versions of images"


def _images(settings: Settings) -> dict[str, Manifest]:
    """Returns the manifests of images that are whole, by key."""
    found = {}
    seals.load(settings.root)
    for path in sorted(settings.images_dir.glob(f"[!.]*/{manifest.MANIFEST}")):
        with contextlib.suppress(OSError, VmmError):  # whoever launches it hears of it
            found[path.parent.name] = manifest.peek(path.parent)
    return found


def _snapshots(settings: Settings) -> Iterator[tuple[str, Provenance]]:
    """Returns sessions that have one, in quarantine too, with what made it."""
    for directory in (settings.sessions_dir, settings.root / "quarantine"):
        for path in directory.glob(f"*/snapshot-*/{SNAPSHOT_MANIFEST}"):
            with contextlib.suppress(VmmError, OSError):
                if (made := diffs.read_manifest(path.parent, path.parents[1].name.partition(".")[0]).made) is not None:
                    yield path.parents[1].name, made


def tidy(settings: Settings, say: Callable[[str], None]) -> None:
    """At a start, before anything is made: writes into images of commit 165a0cb by what they were made, where that is known; writes down
    which roots this instance needs, and removes those that no instance does. Raises OSError, VmmError."""
    there = Roots(settings.cache)
    first = next((root for root in there.all() if root.name == there.first()), None)
    images = _images(settings)
    for key, one in images.items():
        if first is not None and one.hypervisor == "qemu" and not one.made.version:
            one.made = msgspec.structs.replace(one.made, version=first.version, machine=first.machine, root=first.name)
            manifest.write(settings.images_dir / key, one)
    made = [one.made for one in images.values() if one.hypervisor == "qemu"]
    made += [one for _, one in _snapshots(settings) if one.hypervisor == "qemu"]
    roots.collect(settings.cache, settings.root, roots.needs_of(made, there, there.current()), say)


class New(msgspec.Struct, frozen=True):
    """What a build that begins now uses."""

    version: str
    kernel: str
    agent: str


def new(settings: Settings) -> New:
    """Raises OSError, VmmError."""
    guest, agent, _ = kernel.guest(settings.cache)
    return New(Roots(settings.cache).current().version, guest, agent)


def old_images(settings: Settings) -> dict[str, str]:
    """Returns keys of images of which a build would make something newer, and what. Raises OSError, VmmError."""
    now = new(settings)
    return {key: ", ".join(parts) for key, one in _images(settings).items() if (parts := _older(one, now))}


def _older(one: Manifest, now: New) -> list[str]:
    made, parts = one.made, []
    if one.hypervisor == "qemu" and made.version != now.version:
        parts.append(f"made by {made.in_words()}, and the host has {now.version}")
    if made.kernel != now.kernel:
        parts.append(f"kernel {made.kernel or 'not recorded'}, and new ones get {now.kernel}")
    if made.agent != now.agent:
        agent = f"{made.agent or 'not recorded'} (protocol {made.protocol})"
        parts.append(f"agent {agent}, and new ones get {now.agent} (protocol {AGENT_PROTOCOL})")
    return parts


def report(settings: Settings, names: Mapping[str, str], sleepers: Mapping[str, str]) -> list[tuple[str, bool, str]]:
    """Returns lines of `torpor doctor`: what is checked, whether it is well, words. `names`: of images' keys; `sleepers`: sessions that
    sleep, and their images' keys. Raises OSError, VmmError."""
    now, there = new(settings), Roots(settings.cache)
    current = there.current()
    asleep: dict[str, list[str]] = defaultdict(list)
    for session, key in sorted(sleepers.items()):
        asleep[key].append(session)
    lines: dict[tuple[str, bool, str], list[str]] = defaultdict(list)
    for key, one in _images(settings).items():
        for line in _lines(one, now, current, there):
            lines[line].append(key)
    guest = f"kernel {now.kernel}; agent {now.agent}, protocol {AGENT_PROTOCOL}"
    rows = [("new images", True, f"QEMU {current.version}, {current.machine}; {guest}")]
    for (check, is_well, text), keys in lines.items():
        sessions = [session for key in keys for session in asleep[key]]
        who = f"images {_some([names.get(key, key) for key in keys])}" + (f"; sleepers {_some(sessions)}" if sessions else "")
        rows.append((check, is_well, f"{who}: {text}"))
    return rows


def virtualising(settings: Settings, names: Mapping[str, str], sleepers: Mapping[str, str]) -> str:
    """Returns which images, and sleepers of theirs, have guests that see the virtualisation of their processor, and what to do; empty where
    there are none. They were made before it was taken away, and keep what they booted with."""
    keys = [key for key, one in _images(settings).items() if processor.virtualises(one.made.processor)]
    if not keys:
        return ""
    asleep = [session for session, key in sorted(sleepers.items()) if key in keys]
    who = f"images {_some([names.get(key, key) for key in keys])}" + (f"; sleepers {_some(asleep)}" if asleep else "")
    return f"{who}: their guests see virtualisation, which new ones do not; {_REBUILD}"


def _lines(one: Manifest, now: New, current: Root, there: Roots) -> Iterator[tuple[str, bool, str]]:
    made = one.made
    chosen = there.of(made, current) if one.hypervisor == "qemu" else current
    if chosen is None:
        yield "refused", False, why_refused("each", made, there.all())
    elif chosen.version != current.version:
        yield "old hypervisor", True, f"QEMU {chosen.version} in {chosen.path} stays for them, and alone loads what it wrote; {_REBUILD}"
    if made.model and made.model != (here := processor.model()):
        yield "refused", False, f"they were made on {made.model}, and this host's processor is {here}: load them on a host of that model"
    if made.protocol > AGENT_PROTOCOL:
        yield "refused", False, f"the agent speaks protocol {made.protocol}, and this version of Torpor knows those up to {AGENT_PROTOCOL}"
    if made.kernel != now.kernel:
        yield "old kernel", True, f"they run kernel {made.kernel or 'of a version that was not recorded'}; {_REBUILD}"
    if made.agent != now.agent:
        yield "old agent", True, f"they run agent {made.agent or 'that was not recorded'}, protocol {made.protocol}; {_REBUILD}"


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
