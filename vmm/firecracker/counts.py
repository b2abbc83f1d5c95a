"""What Firecracker counts (its docs/metrics.md), summed over the microVMs of this daemon.

A process writes a line of JSON into a named pipe at its start, once a minute, and when it is told to: what it has counted since the line
before. What is parsed is bounded, by the pipe and by a line's length, and held to be numbers: the process is trusted no more than a guest
that has broken into it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

PIPE = "counts"
_READ_BYTES = 64 << 10  # what a pipe holds
_LINE_BYTES = 64 << 10
_LINES = 64  # of one process, that are waited for at once
_MOST = 1 << 53  # that a process can count between two lines
# By group and name in a line, under the names that ours have. The link's directions are the guest's.
COUNTED = {
    ("block", "read_bytes"): "disk_read_bytes",
    ("block", "write_bytes"): "disk_written_bytes",
    ("block", "rate_limiter_throttled_events"): "disk_throttled",
    ("net", "rx_bytes_count"): "link_received_bytes",
    ("net", "tx_bytes_count"): "link_sent_bytes",
    ("net", "rx_rate_limiter_throttled"): "link_received_throttled",
    ("net", "tx_rate_limiter_throttled"): "link_sent_throttled",
    ("entropy", "entropy_bytes"): "entropy_bytes",
    ("entropy", "entropy_rate_limiter_throttled"): "entropy_throttled",
    ("vsock", "rx_bytes_count"): "channel_received_bytes",
    ("vsock", "tx_bytes_count"): "channel_sent_bytes",
    ("vcpu", "failures"): "processor_failures",
    ("seccomp", "num_faults"): "system_calls_refused",
    ("mmds", "rx_accepted"): "mmds_packets",
    ("logger", "missed_metrics_count"): "lines_lost",
}


class CountsPipe:
    """Our end of one process's pipe."""

    def __init__(self, path: Path, sums: Counter[str]) -> None:
        """Opened for writing too, so that it does not end with the process. Raises OSError, also for what is no pipe: the process may put
        something else there."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        if not stat.S_ISFIFO(os.fstat(self._descriptor).st_mode):
            os.close(self._descriptor)
            raise OSError(errno.EINVAL, "no pipe", str(path))
        self._sums = sums
        self._left = b""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._read)

    def _read(self) -> None:
        for _ in range(_LINES):
            try:
                data = os.read(self._descriptor, _READ_BYTES)
            except BlockingIOError:
                return
            *lines, self._left = (self._left + data).split(b"\n")
            for line in lines:
                add(self._sums, line)
            if len(self._left) > _LINE_BYTES:
                self._left = b""

    def close(self) -> None:
        """With what was written until now."""
        self._loop.remove_reader(self._descriptor)
        with contextlib.suppress(OSError):
            self._read()
        os.close(self._descriptor)


def add(sums: Counter[str], line: bytes) -> None:
    """Adds what a line says. One that is torn, too long or none of Firecracker's adds nothing; neither does what is no count."""
    if len(line) > _LINE_BYTES:
        return
    try:
        said: Any = json.loads(line)
    except (ValueError, RecursionError):
        return
    for (group, name), ours in COUNTED.items():
        value = (said.get(group) or {}).get(name) if isinstance(said, dict) and isinstance(said.get(group), dict) else None
        if type(value) is int and 0 < value <= _MOST:
            sums[ours] += value
