"""The table behind docs/api-compatibility.md: each tested rule of the service, with our behaviour and where it comes from.

A test is put into it by `row`; `python tests/rows.py` writes the page, and a test compares the page with the table.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

PAGE = Path(__file__).resolve().parents[1] / "docs/api-compatibility.md"
SOURCES = {"R": "recorded", "M": "measured by third parties", "D": "documented or modelled", "ours": "our choice"}
_MODULES = ("test_api_rows", "test_api_errors", "test_api_models", "test_api_accounts", "test_api_logs", "test_api_connectors",
            "test_api_bad_days")  # fmt: skip
T = TypeVar("T", bound=Callable[..., object])


@dataclass(frozen=True)
class Row:
    about: str
    rule: str
    source: str
    test: str


ROWS: list[Row] = []


def row(about: str, rule: str, source: str) -> Callable[[T], T]:
    """`about` is an operation or a subject; `rule` our behaviour; `source` a key of SOURCES."""
    assert source in SOURCES, source

    def register(test: T) -> T:
        ROWS.append(Row(about, rule, source, test.__name__))
        return test

    return register


def page() -> str:
    """The page as the table has it."""
    for name in _MODULES:
        importlib.import_module(name)
    intro = PAGE.read_text(encoding="utf-8").partition("<!-- rows -->")[0]
    lines = ["| about | our behaviour | source | tested by |", "|---|---|---|---|"]
    lines += [
        f"| {one.about} | {one.rule} | {SOURCES[one.source]} | `{one.test}` |"
        for one in sorted(set(ROWS), key=lambda one: (one.about, one.rule))
    ]
    return f"{intro}<!-- rows -->\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here / "unit")]
    sys.modules["rows"] = sys.modules["__main__"]
    PAGE.write_text(page(), encoding="utf-8")
