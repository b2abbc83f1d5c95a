"""docs/api-coverage.md says what is served, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path

from botocore import xform_name

from gateway.api.images import Images
from gateway.api.microvms import Microvms
from gateway.api.model import Model

PAGE = Path(__file__).resolve().parents[2] / "docs/api-coverage.md"


def test_the_page_is_true() -> None:
    said = dict(re.findall(r"^\| (\w+) \| [A-Z]+ \| (yes|no) \|$", PAGE.read_text(encoding="utf-8"), re.M))
    served = {
        operation.name: "yes" if any(hasattr(target, xform_name(operation.name)) for target in (Microvms, Images)) else "no"
        for operation in Model().operations
    }
    assert said == served
