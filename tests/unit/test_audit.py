"""The audit trail's files: what cannot be written or rotated waits, or is counted; it costs no call."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api_rig import ACCOUNT, PLAIN, VMS, ApiRig

from gateway.observe import audit
from gateway.observe.audit import AuditTrail


@pytest.fixture
def trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AuditTrail:
    monkeypatch.setattr(audit, "_FILE_BYTES", 1000)
    return AuditTrail(tmp_path / "audit", lambda: 0.0)


def write(trail: AuditTrail, *numbers: int) -> None:
    for number in numbers:
        trail.write("RunMicrovm", ACCOUNT, requestID=f"{number}")


def numbers(path: Path) -> list[int]:
    return [int(json.loads(line)["requestID"]) for line in path.read_text().splitlines()]


def kept(tmp_path: Path) -> list[int]:
    """Of all files, the oldest first."""
    paths = sorted(
        (tmp_path / "audit").glob(f"{ACCOUNT}/audit.jsonl*"), key=lambda path: -int(path.suffix[1:]) if path.suffix[1:].isdigit() else 0
    )
    return [number for path in paths for number in numbers(path)]


class Disk:
    """What the trail's system calls meet: room for so many bytes, and calls that are refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 1 << 40
        self.refused: Callable[[str, tuple[Any, ...]], bool] = lambda name, arguments: False
        self._write = os.write
        monkeypatch.setattr(audit.os, "write", self.write)
        for name in ("open", "replace"):
            monkeypatch.setattr(audit.os, name, self._refusing(name, getattr(os, name)))

    def write(self, file: int, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(file, data[: self.room])
        self.room -= written
        return written

    def _refusing(self, name: str, call: Any) -> Any:
        def made(*arguments: Any) -> Any:
            if self.refused(name, arguments):
                raise OSError(errno.EMFILE, "Too many open files")
            return call(*arguments)

        return made


def test_a_full_file_is_rotated(trail: AuditTrail, tmp_path: Path) -> None:
    write(trail, *range(10))
    trail.close()
    assert kept(tmp_path) == list(range(10)) and len(list((tmp_path / "audit").glob(f"{ACCOUNT}/audit.jsonl*"))) > 1


def test_the_oldest_goes_when_there_are_enough(trail: AuditTrail, tmp_path: Path) -> None:
    write(trail, *range(100))
    trail.close()
    left = kept(tmp_path)
    assert left == list(range(left[0], 100)) and len(left) >= 14
    assert len(list((tmp_path / "audit").glob(f"{ACCOUNT}/audit.jsonl*"))) == audit._FILES


def test_a_rotation_that_fails_at_any_step_any_number_of_times_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight calls on a host without descriptors once shifted seven files out, and then nothing was written until a restart."""
    monkeypatch.setattr(audit, "_FILE_BYTES", 1000)
    monkeypatch.setattr(audit, "_FILES", 20)
    for step in range(6):
        disk = Disk(monkeypatch)
        trail = AuditTrail(tmp_path / f"{step}/audit", lambda: 0.0)
        write(trail, *range(12))
        calls: list[str] = []

        def at_step(name: str, arguments: tuple[Any, ...], step: int = step, calls: list[str] = calls) -> bool:
            calls.append(name)
            return len(calls) > step

        disk.refused = at_step
        write(trail, *range(12, 30))
        disk.refused = lambda name, arguments: False
        write(trail, *range(30, 40))
        trail.close()
        assert kept(tmp_path / f"{step}") == list(range(40)), step
        assert (tmp_path / f"{step}/audit/{ACCOUNT}/audit.jsonl").stat().st_size <= 1000, "what failed is done when it can be"
        monkeypatch.undo()
        monkeypatch.setattr(audit, "_FILE_BYTES", 1000)
        monkeypatch.setattr(audit, "_FILES", 20)


@pytest.mark.parametrize("room", [0, 1, 100, 250, 300])
def test_what_a_full_disk_does_not_take_is_written_when_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    disk = Disk(monkeypatch)
    trail = AuditTrail(tmp_path / "audit", lambda: 0.0)
    write(trail, 0)
    disk.room = room
    write(trail, 1, 2, 3)
    disk.room = 1 << 40
    write(trail, 4)
    trail.close()
    assert kept(tmp_path) == [0, 1, 2, 3, 4]


def test_what_is_lost_is_said_in_the_trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_WAITING_BYTES", 1000)
    disk = Disk(monkeypatch)
    trail = AuditTrail(tmp_path / "audit", lambda: 0.0)
    disk.room = 0
    write(trail, *range(20))
    disk.room = 1 << 40
    write(trail, 20)
    trail.close()
    *records, last = [json.loads(line) for line in (tmp_path / f"audit/{ACCOUNT}/audit.jsonl").read_text().splitlines()]
    assert (last["eventName"], last["eventType"]) == ("AuditRecordsLost", "AwsServiceEvent")
    assert last["serviceEventDetails"] == {"RunMicrovm": 21 - len(records)} and records[0]["requestID"] == "0"


def test_a_disk_that_is_full_at_the_start_keeps_no_service_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    disk.refused = lambda name, arguments: name == "open"
    trail = AuditTrail(tmp_path / "audit", lambda: 0.0)
    write(trail, 1, 2)
    trail.sync()
    disk.refused = lambda name, arguments: False
    write(trail, 3)
    trail.close()
    assert kept(tmp_path) == [1, 2, 3]


def test_half_a_record_of_before_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "audit" / ACCOUNT).mkdir(parents=True)
    (tmp_path / f"audit/{ACCOUNT}/audit.jsonl").write_text('{"eventName": "Ru')
    trail = AuditTrail(tmp_path / "audit", lambda: 0.0)
    write(trail, 1)
    trail.close()
    _, following = (tmp_path / f"audit/{ACCOUNT}/audit.jsonl").read_text().splitlines()
    assert json.loads(following)["requestID"] == "1"


def test_unknown_callers_wash_nothing_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_REFUSED_BYTES", 1000)
    trail = AuditTrail(tmp_path / "audit", lambda: 0.0)
    write(trail, 1)
    for _ in range(200):
        trail.write("RunMicrovm", None, userAgent="x" * 8000)
    trail.close()
    assert kept(tmp_path) == [1]
    refused = list((tmp_path / "audit").glob("refused.jsonl*"))
    assert len(refused) == 2 and all(path.stat().st_size < 3000 for path in refused), "fields are cut"


def test_an_account_that_calls_without_end_washes_out_its_own_trail_only(trail: AuditTrail, tmp_path: Path) -> None:
    write(trail, 1)
    for _ in range(500):
        trail.write("ListMicrovms", "210987654321")
    trail.close()
    assert kept(tmp_path) == [1]
    assert len(list((tmp_path / "audit/210987654321").iterdir())) == audit._FILES


def test_the_trail_that_all_accounts_had_together_is_the_first_ones(tmp_path: Path) -> None:
    """As a service of before left it. A move that was ended in its middle goes on."""
    (tmp_path / "audit" / ACCOUNT).mkdir(parents=True)
    for name, number in (("audit.jsonl", 2), ("audit.jsonl.1", 1), (f"{ACCOUNT}/audit.jsonl.2", 0)):
        (tmp_path / "audit" / name).write_text(f'{{"requestID": "{number}"}}\n')
    trail = AuditTrail(tmp_path / "audit", lambda: 0.0)
    trail.adopt(ACCOUNT)
    write(trail, 3)
    trail.close()
    assert kept(tmp_path) == [0, 1, 2, 3] and not list((tmp_path / "audit").glob("audit.jsonl*"))


def test_a_record_is_of_bounded_length(tmp_path: Path) -> None:
    trail = AuditTrail(tmp_path / "audit", lambda: 0.0)
    trail.write("RunMicrovm", ACCOUNT, requestParameters={f"name {number}": "x" * 900 for number in range(1000)}, requestID="1")
    trail.close()
    (line,) = (tmp_path / f"audit/{ACCOUNT}/audit.jsonl").read_bytes().splitlines()
    made = json.loads(line)
    assert len(line) < 2000 and made["requestParameters"]["omitted"] and made["requestParameters"]["originalSize"] > 900_000


def test_no_call_that_was_carried_out_fails_because_of_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = ApiRig(tmp_path)
    try:
        api.image("plain")
        disk = Disk(monkeypatch)
        disk.room = 10
        one = api.run(PLAIN)
        assert api.call("DELETE", f"{VMS}/{one}")[0] == 200
        monkeypatch.setattr(audit, "json", None)  # anything at all that goes wrong
        assert api.call("GET", VMS)[0] == 200
        monkeypatch.undo()
        assert api.call("GET", VMS)[0] == 200
        assert [record["eventName"] for record in api.records()][-4:] == [
            "RunMicrovm",
            "TerminateMicrovm",
            "ListMicrovms",
            "AuditRecordsLost",
        ]
    finally:
        api.close()
