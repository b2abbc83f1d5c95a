"""What an image directory holds. The manifest is written last, so its presence says that the image is whole."""

from __future__ import annotations

from pathlib import Path

import msgspec

from gateway.messages import AGENT_PROTOCOL, Shape

from . import disks
from .errors import Damaged, Refused, unreadable
from .provenance import Provenance

MANIFEST = "manifest.json"


class Manifest(msgspec.Struct):
    """`hypervisor` made the states, and none but it can load them."""

    shape: Shape
    memory_bytes: int
    boot_bytes: int
    hypervisor: str = "qemu"
    made: Provenance = Provenance()


def read(image: Path, hypervisor: str) -> Manifest:
    """Raises Missing, Damaged or Unavailable for one that cannot be read, Refused when another hypervisor made it, or a newer Torpor."""
    try:
        manifest = msgspec.json.decode((image / MANIFEST).read_bytes(), type=Manifest)
    except OSError as error:
        raise unreadable(error, image / MANIFEST) from error
    except ValueError as error:
        raise Damaged(f"{image / MANIFEST} is no manifest: {error}") from error
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
    return manifest


def write(image: Path, manifest: Manifest) -> None:
    """Durable when it returns."""
    temporary = image / f"{MANIFEST}.new"
    temporary.write_bytes(msgspec.json.encode(manifest))
    disks.sync_path(temporary)
    temporary.rename(image / MANIFEST)
    disks.sync_path(image)
