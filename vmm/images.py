"""The images of this host: one directory each, whole from the moment of one rename. What is being made has a dot before its name."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

from . import beneath, disks, sandboxes
from .manifest import MANIFEST

_MAKING, _VOID = ".", ".void-"


class Images:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._names: set[str] | None = None  # once somebody has asked: looking at each takes time

    def names(self) -> list[str]:
        if self._names is None:
            self._names = {path.name for path in self.directory.iterdir() if path.name[0] != _MAKING and (path / MANIFEST).exists()}
        return sorted(self._names)

    def gone(self, image: str) -> None:
        """Somebody has taken an image's directory away."""
        if self._names is not None:
            self._names.discard(image)

    def path(self, image: str) -> Path:
        return beneath.child(self.directory, image)

    def making(self, image: str) -> Path:
        return beneath.child(self.directory, f"{_MAKING}{image}")

    def publish(self, image: str) -> Path:
        """Makes what was made the image, durably. Raises OSError."""
        sandboxes.cut(self.making(image) / "console.log")
        os.rename(self.making(image), self.path(image))
        disks.sync_path(self.directory)
        if self._names is not None:
            self._names.add(image)
        return self.path(image)

    def remove(self, image: str) -> None:
        """Removes the files of an image, and of one that is being made: they are nobody's all at once, and go one by one. Raises OSError;
        it may be asked for again, and goes on then."""
        for path in (self.path(image), self.making(image)):
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, self.directory / f"{_VOID}{time.time_ns()}-{image}")
        self.gone(image)
        for path in self.directory.glob(f"{_VOID}*-{image}"):
            shutil.rmtree(path, onerror=_failed)

    def sweep(self) -> None:
        """Removes what is nobody's any more."""
        for path in self.directory.glob(f"{_VOID}*"):
            shutil.rmtree(path, ignore_errors=True)


def _failed(work: object, name: str, error: tuple[type[BaseException], BaseException, object]) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]
