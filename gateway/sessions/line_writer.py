"""A guest's output becomes lines of a log stream: cut, cleaned of escape sequences, and no more a second than control can take."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from .allowance import Allowance
from .logs import LogStore, dropped_line

_LINE_MAX_BYTES = 256 << 10  # CloudWatch's bound of one event
# CloudWatch took five batches of a MiB a second of one stream. Beyond, reading a guest's output would be all that control does.
_RATE_BYTES, _BURST_BYTES = 5 << 20, 16 << 20
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# What a program writes whose system call was refused for want of a capability (strerror(3), EPERM).
_REFUSED = b"peration not permitted"
ADVICE = (
    'torpor: "Operation not permitted": this image has the default capabilities of a container. What needs more (mounts, network devices, '
    "FUSE, dockerd, kernel modules) works in an image that is created with additionalOsCapabilities ALL"
)


class LineWriter:
    """Cuts a byte stream into lines for one log stream.

    `is_limited` where the guest has not all capabilities: the first time that its application is refused something, one line says so.
    """

    def __init__(
        self, store: LogStore, account: str, group: str, stream: str, is_limited: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._store = store
        self._advises = is_limited
        self._name = (account, group, stream)
        self._rest: dict[int, bytes] = {}
        self._bytes = Allowance(_BURST_BYTES, _RATE_BYTES, clock)
        self._dropped = 0

    def feed(self, channel: int, data: bytes) -> None:
        """Cuts each channel into lines of its own; they are stored together. An application's channels are 1 and more."""
        if not self._bytes.take(len(data)):
            self._dropped += data.count(b"\n")
            self._rest[channel] = data.rpartition(b"\n")[2] if b"\n" in data else b""
            return
        *lines, rest = (self._rest.get(channel, b"") + data).split(b"\n")
        if len(rest) > _LINE_MAX_BYTES:
            lines.append(rest)
            rest = b""
        self._rest[channel] = rest
        if self._advises and channel and any(_REFUSED in line for line in lines):
            lines.append(ADVICE.encode())
            self._advises = False
        if lines:
            self._write(lines)

    def flush(self) -> None:
        rest = [data for data in self._rest.values() if data]
        self._rest.clear()
        if rest or self._dropped:
            self._write(rest)

    def _write(self, lines: list[bytes]) -> None:
        texts = [_ESCAPES.sub("", line.decode("utf-8", "replace").rstrip("\r")) for line in lines]
        if self._dropped:
            texts.insert(0, dropped_line(self._dropped, f"more than {_RATE_BYTES >> 20} MiB a second"))
            self._dropped = 0
        self._store.append(*self._name, texts)
