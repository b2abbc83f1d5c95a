"""The pages about the API say what is served, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path

import rows
from botocore import xform_name

from gateway.api.connectors import Connectors
from gateway.api.images import Images
from gateway.api.microvms import Microvms
from gateway.api.model import Model
from gateway.api.tags import Tags

PAGE = Path(__file__).resolve().parents[2] / "docs/api-coverage.md"
TARGETS = (Microvms, Images, Connectors, Tags)


def never_answered() -> dict[str, set[str]]:
    """By enum: the values that the page says are never answered."""
    table = re.findall(
        r"^\| (\w+) \| ([A-Za-z0-9_, `]+) \| [^|]+ \|$", PAGE.read_text(encoding="utf-8").partition("## Never answered")[2], re.M
    )
    return {name: set(re.findall(r"`(\w+)`", values)) for name, values in table if "`" in values}


def test_the_coverage_page_is_true() -> None:
    said = dict(re.findall(r"^\| (\w+) \| [A-Z]+ \| (yes|refused) \|$", PAGE.read_text(encoding="utf-8"), re.M))
    served = {
        operation.name: "yes" if any(hasattr(target, xform_name(operation.name)) for target in TARGETS) else "refused"
        for operation in Model().operations
    }
    assert said == served
    assert sum(answer == "yes" for answer in said.values()) == 30


def test_the_compatibility_page_is_the_tests_table() -> None:
    assert rows.PAGE.read_text(encoding="utf-8") == rows.page(), "python tests/rows.py writes it"
