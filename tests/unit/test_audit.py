"""The audit trail's file: what cannot be written or rotated costs records, never a call."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gateway.observe import audit
from gateway.observe.audit import AuditTrail


@pytest.fixture
def trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AuditTrail:
    monkeypatch.setattr(audit, "_FILE_BYTES", 1000)
    return AuditTrail(tmp_path / "audit", lambda: 0.0)


def names(path: Path) -> list[str]:
    return [json.loads(line)["requestID"] for line in path.read_text().splitlines()]


def test_a_full_file_is_rotated(trail: AuditTrail, tmp_path: Path) -> None:
    for number in range(10):
        trail.write("RunMicrovm", requestID=f"{number}")
    trail.close()
    found = sorted((tmp_path / "audit").iterdir(), reverse=True)
    assert [name for path in found for name in names(path)] == [f"{number}" for number in range(10)] and len(found) > 1


def test_a_file_that_cannot_be_rotated_goes_on_being_written(trail: AuditTrail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def refuse(*arguments: Any) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(audit.os, "replace", refuse)
    for number in range(10):
        trail.write("RunMicrovm", requestID=f"{number}")
    monkeypatch.setattr(audit.os, "replace", real)
    trail.write("RunMicrovm", requestID="last")
    trail.close()
    assert names(tmp_path / "audit/audit.jsonl.1") == [f"{number}" for number in range(10)]
    assert names(tmp_path / "audit/audit.jsonl") == ["last"]


def test_a_record_that_a_full_disk_takes_in_part_does_not_spoil_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trail = AuditTrail(tmp_path / "audit", lambda: 0.0)
    real = trail._file

    class Full:
        def write(self, data: bytes) -> int:
            return real.write(data[:20])

    monkeypatch.setattr(trail, "_file", Full())
    trail.write("RunMicrovm", requestID="torn")
    monkeypatch.setattr(trail, "_file", real)
    trail.write("RunMicrovm", requestID="next")
    trail.close()
    torn, following = (tmp_path / "audit/audit.jsonl").read_text().splitlines()
    assert len(torn) == 20 and json.loads(following)["requestID"] == "next"
