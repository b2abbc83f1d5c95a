"""The edge's modules as they are written, whether or not they were compiled: compiled classes have no interpreted subclasses."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

_EDGE = Path(__file__).resolve().parents[2] / "gateway/edge"


def source(name: str) -> Any:
    """A module of `gateway.edge`, such as "wire.http2_flow", imported from its source under another package's name. What one of them
    knows of another's classes, it knows of the sources' too."""
    for package in ("", *(f".{room.name}" for room in _EDGE.iterdir() if (room / "__init__.py").exists())):
        if f"edge_sources{package}" not in sys.modules:  # not a package's own __init__, which looks for what was compiled
            made = types.ModuleType(f"edge_sources{package}")
            made.__path__ = [str(_EDGE / package.removeprefix("."))]
            sys.modules[f"edge_sources{package}"] = made
    return importlib.import_module(f"edge_sources.{name}")
