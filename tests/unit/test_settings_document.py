"""docs/operations.md names every setting that there is, and none that there is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from gateway.config import Settings

TEXT = (Path(__file__).resolve().parents[2] / "docs/operations.md").read_text(encoding="utf-8")


def names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from names(kind, f"{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_setting_is_named() -> None:
    assert [name for name in names(Settings) if f"`{name}`" not in TEXT] == []


def test_the_table_names_settings_alone() -> None:
    table = TEXT.partition("## Settings")[2].partition("\n\n|")[2].partition("\n\n")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines()[2:]]
    said = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    assert len(said) > 50 and said <= set(names(Settings))
