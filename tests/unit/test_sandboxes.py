"""A hypervisor's record: the last one that was saved, whole, whatever its length."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from vmm.driver import Process
from vmm.sandboxes import RECORD, save_record


def read(directory: Path) -> Process:
    return msgspec.json.decode((directory / RECORD).read_bytes(), type=Process)


def test_a_record_is_written_over_and_stays_one_page(tmp_path: Path) -> None:
    record = Process(vm="1-a", pid=1, started=2, image="i", uid=3, session="s" * 600)
    save_record(tmp_path, record)
    assert read(tmp_path) == record
    first = (tmp_path / RECORD).stat()
    record.session, record.phase = "s", "running"
    save_record(tmp_path, record)
    assert read(tmp_path) == record
    assert (tmp_path / RECORD).stat().st_ino == first.st_ino and first.st_size == 4096
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]


def test_a_record_that_does_not_fit_is_an_error_and_leaves_the_old_one(tmp_path: Path) -> None:
    record = Process(vm="1-a", pid=1, started=2, image="i", uid=3)
    save_record(tmp_path, record)
    with pytest.raises(OSError, match="1-a has"):
        save_record(tmp_path, Process(vm="1-a", pid=1, started=2, image="i" * 5000, uid=3))
    assert read(tmp_path) == record
