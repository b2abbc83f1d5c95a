"""What Firecracker counts, read from a pipe into which a process that nobody trusts may write anything (vmm/firecracker/counts.py)."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from gateway.observe import metrics
from vmm.firecracker.counts import _LINE_BYTES, COUNTED, CountsPipe, add


def line(**groups: object) -> bytes:
    return json.dumps({"utc_timestamp_ms": 1, **groups}).encode()


def test_lines_are_added_up() -> None:
    sums: Counter[str] = Counter()
    for _ in range(2):
        add(sums, line(block={"read_bytes": 4096, "write_bytes": 0, "flush_count": 7}, vsock={"tx_bytes_count": 5}))
    assert sums == {"disk_read_bytes": 8192, "channel_sent_bytes": 10}


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b"7", b'{"block": 1}', b'{"block": []}', b'{"block": {"read_bytes": "5"}}', b'{"block": {"read_bytes": -5}}',
        b'{"block": {"read_bytes": 1e3}}', b'{"block": {"read_bytes": true}}', b'{"block": {"read_bytes": 9007199254740993}}', b"[" * 30_000,
        line(block={"read_bytes": 5}, other="x" * _LINE_BYTES), b"\xff\xfe",
    ],
)  # fmt: skip
def test_what_is_no_count_adds_nothing(text: bytes) -> None:
    sums: Counter[str] = Counter()
    add(sums, text)
    assert not sums


def test_names_of_ours_are_few_and_each_is_one_figure() -> None:
    assert len(set(COUNTED.values())) == len(COUNTED) < 32


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "counts")
    return tmp_path / "counts"


async def test_a_pipe_is_read_as_it_is_written_and_to_its_end(pipe: Path) -> None:
    sums: Counter[str] = Counter()
    ours = CountsPipe(pipe, sums)
    theirs = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    whole = line(block={"read_bytes": 1}) + b"\n"
    os.write(theirs, whole + whole[:9])
    async with asyncio.timeout(5):
        while sums["disk_read_bytes"] < 1:
            await asyncio.sleep(0)
        os.write(theirs, whole[9:])
        while sums["disk_read_bytes"] < 2:
            await asyncio.sleep(0)
    os.write(theirs, whole)
    os.close(theirs)
    ours.close()
    assert sums["disk_read_bytes"] == 3


async def test_a_line_without_an_end_is_dropped_and_the_next_one_counts(pipe: Path) -> None:
    sums: Counter[str] = Counter()
    ours = CountsPipe(pipe, sums)
    theirs = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    for _ in range(3):
        os.write(theirs, b"x" * 60_000)
        ours._read()
        assert len(ours._left) <= _LINE_BYTES
    os.write(theirs, b"\n" + line(entropy={"entropy_bytes": 64}) + b"\n")
    os.close(theirs)
    ours.close()
    assert sums == {"entropy_bytes": 64}


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
async def test_what_a_process_put_in_the_place_of_its_pipe_is_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "counts"
    if kind == "file":
        path.touch()
    elif kind == "link":
        os.mkfifo(tmp_path / "other")
        path.symlink_to(tmp_path / "other")
    else:
        path.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):
        CountsPipe(path, Counter())
    assert len(os.listdir("/proc/self/fd")) == before


def shown(what: str) -> float:
    name = f'torpor_hypervisors_total{{what="{what}"}} '
    return next(float(one.removeprefix(name)) for one in generate_latest(metrics.registry).decode().splitlines() if one.startswith(name))


def test_a_vmm_that_is_started_anew_takes_nothing_back() -> None:
    for said, expected in (
        ({"of_this_test": 5}, 5),
        ({"of_this_test": 8}, 8),
        ({"of_this_test": 8}, 8),
        ({"of_this_test": 2}, 10),
        ({}, 10),
    ):
        metrics.hypervisors_counted(said)
        assert shown("of_this_test") == expected
