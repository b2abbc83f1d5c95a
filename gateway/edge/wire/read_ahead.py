"""Bytes of a connection may be read before anybody can look at them: the next requests, or a body whose application is not there yet."""

from __future__ import annotations


class ReadAhead:
    """Keeps the rest of a read by its offset, so that a long pipeline is not copied once for each of its requests."""

    __slots__ = ("_at", "_data", "_more", "size")

    def __init__(self) -> None:
        self._data = b""
        self._at = 0  # where in `_data` the kept bytes begin
        self._more: list[bytes] = []
        self.size = 0

    def keep(self, data: bytes, at: int) -> None:
        """Keeps the bytes from `at` on; nothing may be kept yet."""
        assert not self.size
        if at < len(data):
            self._data, self._at = data, at
            self.size = len(data) - at

    def append(self, data: bytes) -> None:
        if self.size:
            self._more.append(data)
            self.size += len(data)
        else:
            self.keep(data, 0)

    def take(self) -> tuple[bytes, int]:
        """Returns all that was kept, as bytes and where in them it begins, and keeps nothing any more."""
        data, at, more = self._data, self._at, self._more
        self._data, self._at, self.size = b"", 0, 0
        if more:
            self._more = []
            data, at = b"".join([data[at:], *more]), 0
        return data, at
