"""docs/operations.md names every setting that there is, and none that there is not; nor is one taken that there is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from gateway import config
from gateway.config import ConfigError, Settings

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


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("TORPOR_EDGE__WORKER", "edge.worker: there is no such setting"),
        ("TORPOR_EGDE__WORKERS", "TORPOR_EGDE__WORKERS: there is no such setting"),
    ],
)
def test_a_variable_that_sets_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, said: str) -> None:
    monkeypatch.setenv(variable, "2")
    with pytest.raises(ConfigError) as raised:
        config.load(root=tmp_path)
    assert str(raised.value) == said


@pytest.mark.parametrize(("text", "said"), [("[edge]\nworker = 2\n", "edge.worker"), ("edges = 2\n", "edges")])
def test_a_line_of_the_file_that_sets_nothing_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "torpor.toml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        config.load(root=tmp_path)
    assert str(raised.value) == f"{said}: there is no such setting"
