"""recover: what an error has ended comes back, or its disk does; and what doctor says of the quarantine."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Annotated

import typer

from gateway import config
from gateway import messages as m
from gateway.sessions.quarantine import leaves_at, patience

from .admin import ask
from .output import errors, fail


def register(app: typer.Typer) -> None:
    app.command()(recover)


def recover(
    name: Annotated[str, typer.Argument(help="The microVM, as `torpor doctor` names it.")],
    disk: Annotated[Path | None, typer.Option("--disk", help="Write its disk to this file (raw) instead; what is set aside stays.")] = None,
    image: Annotated[str, typer.Option("--image", help="Of which image a stranger's disk is: a directory of ROOT/images.")] = "",
) -> None:
    """Try again with a microVM that an error has ended: it sleeps again under its id and endpoint.

    Example: torpor recover microvm-7e0c…
    """
    if disk is not None:
        hand_out(config.load(), name, disk, image)
    else:
        size = next((one.bytes for one in quarantined(config.load()) if one.session == name), 0)
        ask("recover", m.SessionName(name), seconds=patience(size))
        errors.print(f"torpor: {name} is SUSPENDED again", soft_wrap=True)


def hand_out(settings: config.Settings, name: str, target: Path, image: str = "") -> None:
    from vmm import handout
    from vmm.errors import VmmError

    found = next((one for one in quarantined(settings) if one.session == name), None)
    if found is None:
        fail(f"nothing is set aside under {name} in {settings.root / 'quarantine'}", 1)
    if target.exists():
        fail(f"{target} is there: name a file that is not", 2)
    places = images(settings)
    key = found.image or image
    if not found.image and key not in places:
        fail(f"{name} was not in the store: name its image with --image ({', '.join(sorted(places)) or 'there is none'})", 2)
    try:
        handout.hand_out(settings.root / "quarantine" / name, places.get(key, settings.images_dir / key), target)
    except (VmmError, OSError) as error:
        fail(str(error), 1)


def images(settings: config.Settings) -> dict[str, Path]:
    """Returns where the files of each image version are, by key: strangers too, which are set aside."""
    aside = {path.name.removeprefix("image-"): path for path in (settings.root / "quarantine").glob("image-*")}
    return aside | {path.name: path for path in settings.images_dir.glob("[!.]*") if path.is_dir()}


def quarantined(settings: config.Settings) -> list[m.Quarantined]:
    """Reads what is set aside, also while no service runs. Raises OSError."""
    from vmm.quarantine import Quarantine

    return Quarantine(settings.sessions_dir, settings.root / "quarantine", settings.images_dir).list()


def rows(settings: config.Settings) -> list[tuple[str, bool, str]]:
    """Returns what doctor says of the quarantine."""
    try:
        found = quarantined(settings)
    except OSError as error:
        return [("quarantine", False, f"cannot be read: {error}")]
    size, now = sum(one.bytes for one in found), time.time()
    full = "" if size <= settings.quarantine.mib << 20 else ", more than quarantine.mib: the oldest goes within twenty minutes"
    listed = [("quarantine", not full, f"{len(found)} set aside, {size >> 20} of {settings.quarantine.mib} MiB{full}")]
    for one in found:
        day = datetime.datetime.fromtimestamp(leaves_at(one, settings.quarantine)).strftime("%F")
        text = f"{one.session}: {one.reason} ({age(now - one.at)} ago, {one.bytes >> 20} MiB; removed on {day}){_way_back(one)}"
        listed.append(("set aside", False, text))
    return listed


def _way_back(one: m.Quarantined) -> str:
    if not one.image or one.session.startswith("image-"):  # a stranger: no row leads to it
        disk = "" if one.session.startswith("image-") else f", and torpor recover {one.session} --disk FILE hands out its disk"
        return f"; it can be moved back under the store that knows it{disk}"
    again = "tries again" if one.snapshot else "cannot bring it back without a snapshot"
    return f"; torpor recover {one.session} {again}, --disk FILE hands out its disk"


def age(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"
