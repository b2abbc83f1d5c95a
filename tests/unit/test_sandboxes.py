"""A hypervisor's record: the last one that was saved, whole, whatever its length."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from vmm.driver import Process
from vmm.sandboxes import RECORD, cut, last_words, save_record


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


def test_what_a_guest_can_make_grow_is_cut_and_its_end_stays(tmp_path: Path) -> None:
    """Its writer goes on behind what stays: it appends."""
    log = tmp_path / "stderr"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"short\n")
        cut(log)
        assert log.read_bytes() == b"short\n"
        for number in range(40_000):
            writer.write(b"line %d of a guest that has no end\n" % number)
        cut(log)
        writer.write(b"its last words\n")
    kept = log.read_bytes()
    assert len(kept) < 70_000 and kept.startswith(b"line ") and kept.endswith(b"line 39999 of a guest that has no end\nits last words\n")


def test_last_words_are_the_end_and_not_the_whole(tmp_path: Path) -> None:
    """They were read whole, whatever a guest had made of them."""
    assert last_words(tmp_path) == ""
    with (tmp_path / "stderr").open("wb") as file:
        file.write(b"x" * 5 + b"\n")
        assert last_words(tmp_path) == ""
        file.flush()
        assert last_words(tmp_path) == "xxxxx"
        file.seek(1 << 36)
        file.write("é".encode() * 300 + b"\nthe end\n")
    assert last_words(tmp_path).endswith("é; the end")
