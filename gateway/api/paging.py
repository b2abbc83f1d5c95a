"""Pages: opaque tokens that name the last item given, so that a page goes on even when items come and go."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from .errors import Validation

_DEFAULT_PAGE = 50
T = TypeVar("T")


class Pager:
    """Tokens are sealed with a key of the instance: a made-up one is refused."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def page(self, what: str, items: Sequence[T], key: Callable[[T], list[Any]], call: dict[str, Any]) -> tuple[list[T], str | None]:
        """One page of items sorted by `key`, and the token of the next. Raises Validation for a bad token."""
        limit = call.get("maxResults") or _DEFAULT_PAGE
        ordered = sorted(items, key=key)
        if call.get("nextToken"):
            after = self._open(what, call["nextToken"])
            ordered = [item for item in ordered if key(item) > after]
        page = ordered[:limit]
        return page, (self._seal(what, key(page[-1])) if len(ordered) > limit else None)

    def _tag(self, text: bytes) -> bytes:
        return hmac.new(self._key, text, hashlib.sha256).digest()

    def _seal(self, what: str, position: list[Any]) -> str:
        text = msgspec.json.encode([what, position])
        return base64.urlsafe_b64encode(self._tag(text) + text).decode()

    def _open(self, what: str, token: str) -> list[Any]:
        try:
            data = base64.urlsafe_b64decode(token.encode())
            tag, text = data[:32], data[32:]
            if not hmac.compare_digest(tag, self._tag(text)):
                raise ValueError
            kind, position = msgspec.json.decode(text, type=tuple[str, list[Any]])
            if kind != what:
                raise ValueError
        except (ValueError, binascii.Error, msgspec.DecodeError):
            raise Validation("Invalid nextToken: use the one that the previous page gave.") from None
        return position
