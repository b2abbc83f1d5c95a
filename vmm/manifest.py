"""What an image directory holds. The manifest is written last, so its presence says that the image is whole."""

from __future__ import annotations

from pathlib import Path

import msgspec

from . import disks
from .driver import Shape
from .errors import StateLost, VmmError
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
    """Raises StateLost when the image is not whole, VmmError when another hypervisor made it."""
    try:
        manifest = msgspec.json.decode((image / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise StateLost(f"image {image.name} cannot be read: {error}") from error
    if manifest.hypervisor != hypervisor:
        raise VmmError(
            f"image {image.name} was made with {manifest.hypervisor}, and this host runs {hypervisor}: "
            f'set hypervisor = "{manifest.hypervisor}", or build a new version'
        )
    return manifest


def write(image: Path, manifest: Manifest) -> None:
    """Durable when it returns."""
    temporary = image / f"{MANIFEST}.new"
    temporary.write_bytes(msgspec.json.encode(manifest))
    disks.sync_path(temporary)
    temporary.rename(image / MANIFEST)
    disks.sync_path(image)
