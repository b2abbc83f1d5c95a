"""Calls about whose the directories are: control decides, and only root can read and write there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

from gateway import messages as m
from gateway.config import Settings
from gateway.executors import BULK
from gateway.rpc import Connection

from .. import beneath, disks
from ..errors import not_written
from ..images import Images
from ..quarantine import move

_MARK = "instance-id"


class IdentityCalls:
    def __init__(self, settings: Settings, images: Images) -> None:
        self._known = images
        self._images = settings.images_dir
        self._sessions = settings.sessions_dir
        self._quarantine = settings.root / "quarantine"

    async def rpc_marks(self, connection: Connection, body: None) -> m.Marks:
        return await BULK.run(lambda: m.Marks(_read(self._images), _read(self._sessions)))

    async def rpc_mark(self, connection: Connection, body: m.MarkRequest) -> None:
        for directory in (self._images, self._sessions):
            await BULK.run(_write, directory, body.instance)

    async def rpc_quarantine_image(self, connection: Connection, body: m.ImageQuarantineRequest) -> None:
        await BULK.run(self._set_aside, body)

    def _set_aside(self, body: m.ImageQuarantineRequest) -> None:
        """Idempotent. Raises VmmError."""
        source, target = self._known.path(body.image), beneath.child(self._quarantine, f"image-{body.image}")
        if not source.exists():
            return
        reason = m.Quarantined(target.name, 0, body.image, body.reason, time.time())
        try:
            self._quarantine.mkdir(mode=0o700, exist_ok=True)
            (source / "reason.json").write_bytes(msgspec.json.encode(reason))
            move(source, target)
            self._known.gone(body.image)
        except OSError as error:
            raise not_written(error, f"image {body.image}", f"image {body.image} could not be set aside") from error


def _read(directory: Path) -> str:
    """Raises OSError for one that cannot be read, which is not as good as none."""
    try:
        return (directory / _MARK).read_text(encoding="ascii", errors="backslashreplace").strip()
    except FileNotFoundError:
        return ""


def _write(directory: Path, instance: str) -> None:
    """Durable when it returns. Raises VmmError."""
    temporary = directory / f"{_MARK}.new"
    try:
        temporary.write_text(f"{instance}\n", encoding="ascii")
        disks.sync_path(temporary)
        os.rename(temporary, directory / _MARK)
        disks.sync_path(directory)
    except OSError as error:
        raise not_written(error, "the instance id", f"{directory / _MARK} could not be written") from error
