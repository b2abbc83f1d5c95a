"""The disk of a session that was set aside, as one file that any tool can mount: all layers in one, raw and sparse.

The names are ours (vmm/disks.py), and no name inside a file is followed: the layers are told to qemu-img as QEMU is told them.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from . import disks, manifest
from .errors import Missing, Unavailable
from .snapshots import OVERLAY

_SECONDS = 3600


def hand_out(files: Path, image: Path, target: Path) -> None:
    """Writes the disk whose top layer lies in `files`, and whose other ones are the image's. Raises Missing, Unavailable, OSError."""
    overlay = files / OVERLAY
    for path in (overlay, image / manifest.MANIFEST):
        if not path.exists():
            raise Missing(f"{path} is not there")
    try:
        hypervisor = json.loads((image / manifest.MANIFEST).read_bytes())["manifest"].get("hypervisor", "qemu")
    except (ValueError, LookupError) as error:
        raise Unavailable(f"{image / manifest.MANIFEST}: {error}") from error
    half = target.with_name(f"{target.name}.new")
    try:
        if hypervisor == "firecracker":  # a raw disk as it is
            disks.copy_overlay(overlay, half)
        else:
            _flatten([image / "disk.raw", image / "boot.qcow2", overlay], half)
        half.chmod(0o600)
        half.rename(target)
    finally:
        half.unlink(missing_ok=True)


def _flatten(layers: list[Path], target: Path) -> None:
    """`layers`: the lowest one, which is raw, first."""
    node: dict[str, object] | None = None
    for path in layers:
        file = {"driver": "file", "filename": str(path)}
        node = {"driver": "qcow2", "file": file, "backing": node} if node else {"driver": "raw", "file": file}
    command = ["qemu-img", "convert", "-O", "raw", f"json:{json.dumps(node)}", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise Unavailable(f"{target} could not be written: {done.stderr.strip()}")
