"""Draws the end of a demo as a terminal picture: `FORCE_COLOR=1 make demo | .venv/bin/python config/picture.py docs/demo.svg`."""

from __future__ import annotations

import io
import sys

from rich.console import Console
from rich.text import Text

COLUMNS = 112
FIRST = "5. "  # the step that it begins with


def main() -> None:
    lines = [Text.from_ansi(line) for line in sys.stdin.read().strip().splitlines()]
    start = next((at for at, line in enumerate(lines) if line.plain.startswith(FIRST)), 0)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    for line in lines[start:]:
        line.truncate(COLUMNS, overflow="ellipsis")
        console.print(line, no_wrap=True, crop=True)
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write(console.export_svg(title="make demo"))


if __name__ == "__main__":
    main()
