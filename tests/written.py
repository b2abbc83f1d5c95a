"""A transport that keeps what is written."""

from __future__ import annotations


class Written:
    def __init__(self) -> None:
        self.data, self.is_closed = b"", False

    def write(self, data: bytes) -> None:
        self.data += data

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.is_closed
