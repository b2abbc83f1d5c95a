"""Pages: opaque tokens that name the last item given, so that a page goes on even when items come and go."""

from __future__ import annotations

import base64
import binascii
import bisect
import hashlib
import hmac
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from .errors import InvalidParameter, Validation

_DEFAULT_PAGE = 50
T = TypeVar("T")
Key = tuple[Any, ...]


class _Unsealed(ValueError):
    """A token that no page gave."""


class Pager:
    """Tokens are sealed with a key of the instance: a made-up one is refused."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def page(self, what: str, items: Iterable[T], key: Callable[[T], Key], call: dict[str, Any]) -> tuple[list[T], str | None]:
        """Returns one page of items sorted by `key`, and the token of the next. Raises Validation for a bad token."""
        by_key = {key(item): item for item in items}
        page, token = self.page_of_keys(what, sorted(by_key), call)
        return [by_key[key] for key in page], token

    def page_of_keys(self, what: str, ordered: Sequence[Key], call: dict[str, Any]) -> tuple[list[Key], str | None]:
        """Returns the same for keys that are in order already: costs the page, not the list."""
        limit = call.get("maxResults") or call.get("MaxItems") or _DEFAULT_PAGE
        given = call.get("nextToken") or call.get("Marker")
        try:
            first = bisect.bisect_right(ordered, self._open(what, given)) if given else 0
        except _Unsealed:
            if "Marker" in call:
                raise InvalidParameter("Invalid Marker: use the NextMarker that the previous page gave.") from None
            raise Validation("Invalid nextToken: use the one that the previous page gave.") from None
        page = list(ordered[first : first + limit])
        return page, (self._seal(what, page[-1]) if len(ordered) > first + limit else None)

    def _tag(self, text: bytes) -> bytes:
        return hmac.new(self._key, text, hashlib.sha256).digest()

    def _seal(self, what: str, position: Key) -> str:
        text = msgspec.json.encode([what, position])
        return base64.urlsafe_b64encode(self._tag(text) + text).decode()

    def _open(self, what: str, token: str) -> Key:
        """Raises _Unsealed for a token that was not given for `what`."""
        try:
            data = base64.urlsafe_b64decode(token.encode())
            tag, text = data[:32], data[32:]
            if not hmac.compare_digest(tag, self._tag(text)):
                raise ValueError
            kind, position = msgspec.json.decode(text, type=tuple[str, list[Any]])
            if kind != what:
                raise ValueError
        except (ValueError, binascii.Error, msgspec.DecodeError):
            raise _Unsealed from None
        return tuple(position)
