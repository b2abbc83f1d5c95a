"""For scripted hosts: their guests answer at once, so what is stored after a resume is stored at once."""

from __future__ import annotations

import pytest

from gateway.sessions import transitions


@pytest.fixture(autouse=True)
def stored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transitions, "_FIRST_SECONDS", 0.0)
