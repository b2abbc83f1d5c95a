"""What connections to applications, and cached heads, are found by."""

from __future__ import annotations

from ..wire.http2_frames import Field

Key = tuple[str, int, int]  # of a pool of connections: session, incarnation, port
FieldList = tuple[Field, ...]  # a request's decoded field section, as HTTP/2 brings it
