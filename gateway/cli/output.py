"""What the commands print: tables for people, JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

_CONTROL = {chr(number): f"^{chr(number ^ 0x40)}" for number in (*range(32), 127)}
# Without markup: an address, an ARN or an error's text may have square brackets.
console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
errors = Console(stderr=True, highlight=False, markup=False)


def fail(text: str, code: int = 1) -> NoReturn:
    errors.print(Text("torpor: ", style="bold red").append(text, style="not bold default"), soft_wrap=True)
    sys.exit(code)


def no_instance(root: Path) -> NoReturn:
    fail(f"no instance at {root}: start one with `torpor serve`, or name it with TORPOR_ROOT")


def line_of(text: str) -> str:
    """Returns what a stranger's program wrote as one line for a terminal: control characters are shown and not obeyed, which could write to
    the clipboard, set titles or overwrite other lines."""
    return "".join(one if one.isprintable() or one == "\t" else _CONTROL.get(one, f"\\x{ord(one):02x}") for one in text)


def show_json(value: Any) -> None:
    """Timestamps as ISO 8601."""
    print(json.dumps(value, indent=2, default=lambda item: item.isoformat() if hasattr(item, "isoformat") else str(item)))


def show_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else "" if cell is None else str(cell) for cell in row))
    console.print(table)


def mib(value: int | None) -> str:
    return "" if value is None else f"{value / (1 << 20):.1f} MiB"
