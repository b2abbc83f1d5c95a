"""What a row of the table of applications is. Its image is what its users would write (images/NAME/), its client is the one that they
would use, and `use` is what they do with it, with a sleep or more in the middle: the next thing that the client does is what wakes it.

Rows stand in applications/rows/*.py. test_applications.py runs them; document.py writes docs/applications.md from them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from applications.visit import Visit


@dataclass(frozen=True)
class Application:
    """`survives` and `sees` are the row's words in docs/applications.md: what is as before after a sleep, and what its client notices.
    `memory` is minimumMemoryInMiB, `launch` has members of RunMicrovm, `files` makes those that are not in the image's directory. `times` is
    how long its build may take, in seconds."""

    name: str
    title: str
    client: str
    use: Callable[[Visit], None]
    port: int
    survives: str
    sees: str = "nothing"
    memory: int = 512
    launch: Mapping[str, Any] = field(default_factory=dict)
    files: Callable[[], Mapping[str, bytes]] = dict
    times: float = 600.0


def applications() -> list[Application]:
    """Every row, in the order of the modules' names."""
    package = importlib.import_module("applications.rows")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [row for name in names for row in importlib.import_module(f"applications.rows.{name}").ROWS]
