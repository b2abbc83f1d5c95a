"""The edge's modules as they are written, whether or not they were compiled: compiled classes have no interpreted subclasses."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

_EDGE = Path(__file__).resolve().parents[2] / "gateway/edge"


def source(name: str) -> Any:
    """A module of `gateway.edge`, imported from its source under another package's name. What one of them knows of another's
    classes, it knows of the sources' too."""
    if "edge_sources" not in sys.modules:
        package = types.ModuleType("edge_sources")
        package.__path__ = [str(_EDGE)]
        sys.modules["edge_sources"] = package
    return importlib.import_module(f"edge_sources.{name}")
