"""What was parsed and verified once: clients repeat their fields to the byte.

The key is the raw field block; whole heads that repeat are remembered on top of it. An entry is used only for HTTP/1.1
requests in origin form, or HTTP/2's (an absolute form would override Host), never for those with a body, Expect or Upgrade, and only while
the token has not expired, the key set is the one it was verified with, and the route is the very one it was admitted to:
anything less would be a way around the token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from gateway.messages import Route
from gateway.tokens import Checker

from .pool import Key
from .table import Account

K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class Admitted:
    """A field block whose request may be forwarded at once."""

    host: str
    route: Route
    checker: Checker
    expires: float
    key: Key
    account: Account
    block: bytes
    keep_alive: bool


@dataclass(slots=True)
class Repeated:
    """A whole head that was seen before: its admission, and what it becomes for the application."""

    memo: Admitted
    rewritten: bytes
    is_head: bool
    is_safe: bool  # it can be sent once more (RFC 9110, 9.2.1)


class Memo(Generic[K, V]):
    """Bounded: when it is full, the older half goes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: dict[K, V] = {}
        self.get = self._entries.get

    def put(self, key: K, value: V) -> None:
        if len(self._entries) >= self._most:
            for old in list(self._entries)[: self._most // 2]:
                del self._entries[old]
        self._entries[key] = value

    def drop(self, key: K) -> None:
        self._entries.pop(key, None)

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
