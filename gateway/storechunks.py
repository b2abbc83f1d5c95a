"""Bodies that are signed in chunks, each with the one before it (S3 API Reference: "Transferring Payload in Multiple Chunks")."""

from __future__ import annotations

import hashlib
import hmac
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from .api.errors import ApiError
from .api.sigv4 import Signature

FORM: Final = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
_HEAD = re.compile(rb"([0-9a-fA-F]{1,8});chunk-signature=([0-9a-f]{64})\r\n")
_HEAD_BYTES, _LONGEST = 128, 16 << 20
_NOTHING = hashlib.sha256(b"").hexdigest()


class ChunkRefused(ApiError):
    kind, status = "SignatureDoesNotMatch", 403


@dataclass(frozen=True)
class Chain:
    """What signs the chunks of a request whose head was checked."""

    claimed: Signature
    signing: bytes

    def read(self, stream: Any) -> Iterator[bytes]:
        """Yields each chunk once its signature is the one that is wanted. Raises ChunkRefused, OSError."""
        lines = io.BufferedReader(stream)
        before, length = self.claimed.digest, 1
        while length:
            head = _HEAD.fullmatch(lines.readline(_HEAD_BYTES))
            length = int(head[1], 16) if head else _LONGEST + 1
            if head is None or length > _LONGEST:
                raise ChunkRefused(f"A chunk must begin with its length, of at most {_LONGEST} bytes, and its signature.")
            data = lines.read(length)
            before = self._signature(before, data)
            if lines.read(2) != b"\r\n" or not hmac.compare_digest(before.encode(), head[2]):
                raise ChunkRefused("The signature of a chunk does not match the one that was calculated.")
            yield data
        if lines.read(1):
            raise ChunkRefused("Something follows the last chunk, and is not signed.")

    def _signature(self, before: str, data: bytes) -> str:
        claimed = self.claimed
        parts = ["AWS4-HMAC-SHA256-PAYLOAD", claimed.stamp, claimed.scope, before, _NOTHING, hashlib.sha256(data).hexdigest()]
        return hmac.new(self.signing, "\n".join(parts).encode(), hashlib.sha256).hexdigest()
