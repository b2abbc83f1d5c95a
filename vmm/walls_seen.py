"""The walls around the hypervisors of an instance that run, as the kernel has them (/proc)."""

from __future__ import annotations

import os
from typing import NamedTuple

from gateway.config import Settings

from . import jail, leftovers, sandboxes
from .driver import Process


class Seen(NamedTuple):
    """`running`: of hypervisors that were looked at. `lacking`: by a wall's name, those around which it does not stand."""

    running: int
    lacking: dict[str, list[str]]


def look(settings: Settings) -> Seen:
    count = 0
    lacking: dict[str, list[str]] = {}
    for record in leftovers.records_of(settings):
        try:
            stands = _confirmed(record) if sandboxes.is_alive(record) else None
        except OSError as error:
            stands = {} if sandboxes.is_alive(record) else None  # it has ended meanwhile
            if stands is not None:
                lacking.setdefault("", []).append(f"{record.vm} (process {record.pid}) cannot be looked at: {error}")
        if stands is None:
            continue
        count += 1
        for name, is_so in stands.items():
            if not is_so:
                lacking.setdefault(name, []).append(f"{record.vm} (process {record.pid})")
    return Seen(count, lacking)


def _confirmed(record: Process) -> dict[str, bool]:
    is_jailers = os.path.basename(os.readlink(f"/proc/{record.pid}/exe")) == "firecracker"
    return (jail.confirmed_of_jailer if is_jailers else jail.confirmed)(record.pid, record.uid)
