"""backup, restore: an instance's state in a file, and back."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from gateway import backup as work
from gateway import config

from .host import Json, Name, Root
from .output import errors, fail, show_json
from .repair import is_served

_KINDS = {"files": "with their files", "archived": "in the object store", "row": "without files"}


def register(app: typer.Typer) -> None:
    app.command()(backup)
    app.command()(restore)


def backup(
    target: Annotated[Path, typer.Argument(help="A directory to make, or a file whose name ends with .tar.")],
    data: Annotated[bool, typer.Option("--data", help="Images and sleeping microVMs too.")] = False,
    root: Root = None,
    name: Name = None,
    as_json: Json = False,
) -> None:
    """Back up the store, keys and settings, also while the service runs; keep it safe: it has every secret of the instance.

    Example: torpor backup --data /mnt/backup/torpor-monday
    """
    if os.geteuid() != 0:
        fail("backup needs root: it reads keys", 2)
    try:
        made = work.backup(config.load(root=root, name=name), target, data, lambda text: errors.print(f"torpor: {text}", soft_wrap=True))
    except work.BackupError as error:
        fail(str(error))
    if as_json:
        show_json({"target": str(target), "sessions": made.sessions, "images": made.images, "versions": made.versions})
        return
    kinds = Counter(made.sessions.values())
    of = ", ".join(f"{kinds[kind]} {text}" for kind, text in _KINDS.items() if kinds[kind])
    missing = len(made.versions) - len(made.images)
    without = f" ({missing} without {'their' if missing != 1 else 'its'} files)" if missing else ""
    print(f"torpor: {target}: {len(made.versions)} image versions{without}, {len(made.sessions)} microVMs{f' ({of})' if of else ''}")


def restore(
    source: Annotated[Path, typer.Argument(help="What `torpor backup` made.")],
    replace: Annotated[bool, typer.Option("--replace", help="Move what is in the way to ROOT/replaced-…")] = False,
    without_files: Annotated[bool, typer.Option("--without-files", help="Also where sleeping microVMs will have no files.")] = False,
    root: Root = None,
    name: Name = None,
) -> None:
    """Lay a backup out in the instance's root; the service must be stopped.

    Example: torpor restore /mnt/backup/torpor-monday --root /var/lib/torpor
    """
    if os.geteuid() != 0:
        fail("restore needs root: it makes files of other users", 2)
    settings = config.load(root=root, name=name)
    if is_served(settings):
        fail(f"instance {settings.name} is served: stop it first")
    if not source.exists():
        fail(f"{source} is not there")
    try:
        contents, old = work.restore(settings, source, replace, without_files)
    except work.BackupError as error:
        fail(str(error))
    if old is not None:
        print(f"torpor: what was there is now in {old}")
    print(f"torpor: {settings.root} is as {contents.root} was: torpor serve --root {settings.root}")
