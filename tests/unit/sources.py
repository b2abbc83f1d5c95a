"""The edge's modules as they are written, whether or not they were compiled: compiled classes have no interpreted subclasses."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

_EDGE = Path(__file__).resolve().parents[2] / "gateway/edge"


def source(name: str) -> Any:
    """A module of `gateway.edge`, as `wire.http2_flow`, imported from its source under another package's name. What one of them knows of another's
    classes, it knows of the sources' too."""
    if "edge_sources" not in sys.modules:
        for folder in (_EDGE, *(one.parent for one in _EDGE.glob("*/__init__.py"))):
            package = types.ModuleType(".".join(["edge_sources", *folder.relative_to(_EDGE).parts]))
            package.__path__ = [str(folder)]  # their __init__ is not run: it looks for what was compiled
            sys.modules[package.__name__] = package
    return importlib.import_module(f"edge_sources.{name}")
