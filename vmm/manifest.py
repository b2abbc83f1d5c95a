"""What an image directory holds. The manifest is written last, so its presence says that the image is whole."""

from __future__ import annotations

from pathlib import Path

import msgspec

from gateway import files
from gateway.messages import AGENT_PROTOCOL, Shape

from . import diffs, seals
from .diffs import Sum
from .driver import DEVICES
from .errors import Damaged, Refused, unreadable
from .provenance import Provenance

MANIFEST = "manifest.json"
_KEPT = ("memory.raw", DEVICES, "disk.raw", "boot.qcow2", "overlay.qcow2")


class Manifest(msgspec.Struct):
    """`hypervisor` made the states, and none but it can load them. `image` and `account`: whose it is; no account: made before it was
    written down. `files`: sizes, and of the devices' state a checksum (memory and disks are mapped and read as they are wanted)."""

    shape: Shape
    memory_bytes: int
    boot_bytes: int
    hypervisor: str = "qemu"
    made: Provenance = Provenance()
    image: str = ""
    account: str = ""
    files: list[Sum] = []


def peek(image: Path) -> Manifest:
    """Returns the manifest of an image, whoever made it. Raises Missing, Damaged, also for another image's, Refused, Unavailable."""
    path = image / MANIFEST
    _, data = seals.opened(seals.IMAGE, path)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except ValueError as error:
        raise Damaged(f"{path} is no manifest: {error}") from error
    if manifest.image != key_of(image):
        raise Damaged(f"{path} is of image {manifest.image}, and lies in the place of {key_of(image)}'s")
    return manifest


def read(image: Path, hypervisor: str) -> Manifest:
    """As `peek`, for this host's hypervisor: Refused also when another one made it, or a newer Torpor; Damaged for a device state or a size
    that is not what was written."""
    manifest = peek(image)
    if manifest.hypervisor != hypervisor:
        raise Refused(
            f"image {image.name} was made with {manifest.hypervisor}, and this host runs {hypervisor}: "
            f'set hypervisor = "{manifest.hypervisor}", or build a new version'
        )
    if manifest.made.protocol > AGENT_PROTOCOL:
        raise Refused(
            f"the agent in image {image.name} speaks protocol {manifest.made.protocol}, and this version of Torpor knows those up to "
            f"{AGENT_PROTOCOL}: start the newer version again"
        )
    for one in manifest.files:
        _compare(image / one.name, one)
    return manifest


def _compare(path: Path, expected: Sum) -> None:
    if expected.digest:
        diffs.verify(path, expected)
        return
    try:
        size = path.stat(follow_symlinks=False).st_size
    except OSError as error:
        raise unreadable(error, path) from error
    if size != expected.size:
        raise Damaged(f"{path} is damaged: it has {size} bytes, not {expected.size}")


def sums(image: Path) -> list[Sum]:
    """Returns what `files` has of an image that is whole but for its manifest. Raises VmmError, OSError."""
    names = sorted(path.name for path in image.iterdir() if path.name in _KEPT)
    return [diffs.checksum(image / name) if name == DEVICES else Sum(name, (image / name).stat().st_size, "") for name in names]


def key_of(image: Path) -> str:
    """Returns an image's key, also of one that is being made."""
    return image.name.removeprefix(".")


def write(image: Path, manifest: Manifest) -> None:
    """Durable when it returns. It is the image's whose directory this is. Raises VmmError, OSError."""
    manifest.image = key_of(image)
    files.write(image / MANIFEST, seals.seal(seals.IMAGE, manifest.account, msgspec.json.encode(manifest)), 0o600)
