"""What unit tests share: the edge on loopback, and hosts whose guests answer at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from edge_rig import Rig

from gateway.sessions import transitions
from vmm import kernel

# Plain tracebacks, as in the service: with local variables, drawn by rich, each costs 40 ms.
_console = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
structlog.configure(processors=[*structlog.get_config()["processors"][:-1], _console])


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Rig]:
    """An edge worker that serves plain HTTP/1.1. A file whose tests start theirs in other ways has a fixture of its own."""
    one = Rig(tmp_path, monkeypatch)
    await one.start()
    yield one
    await one.stop()


@pytest.fixture
def own_watcher() -> Iterator[None]:
    """What a test makes of asyncio's child watcher, which is the process's, is no later test's."""
    before = asyncio.get_child_watcher()
    yield
    asyncio.set_child_watcher(before)


@pytest.fixture(autouse=True)
def stored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored after a resume is stored at once, because scripted guests answer at once."""
    monkeypatch.setattr(transitions, "_FIRST_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def apt_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel apt knows takes it a second to say where it keeps no cache of its own; each test's cache of assets is new."""
    monkeypatch.setattr(kernel, "_ask_apt", lambda: "6.1-1")
