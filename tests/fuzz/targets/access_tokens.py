"""Access tokens (gateway/tokens.py): none is taken but one that was minted."""

from __future__ import annotations

import base64
import functools
import json
import tempfile
from pathlib import Path

from gateway.tokens import Checker, Minter, TokenError

TRACED = ("gateway.tokens",)
_NOW = 1_800_000_000.0
WORDS = (
    b".",
    b"..",
    b"=",
    b"eyJ",
    b"-_",
    b"+/",
    b"\xff",
    b"\0",
    b" ",
    b"e30",
    b"bnVsbA",
    base64.urlsafe_b64encode(b"[" * 3000).rstrip(b"="),
    base64.urlsafe_b64encode(b'{"kid":' * 300),
)


@functools.cache
def _minted() -> tuple[str, Checker]:
    with tempfile.TemporaryDirectory() as directory:
        minter = Minter(Path(directory) / "keys", lambda: _NOW)
        return minter.mint("s", [(80, 90)], 600), Checker(minter.verifiers())


def _header(header: object) -> bytes:
    rest = _minted()[0].split(".", 1)[1]
    return base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=") + b"." + rest.encode()


def seeds() -> list[bytes]:
    return [
        _minted()[0].encode(),
        _header({"kid": "x", "alg": "dir", "enc": "A256GCM"}),
        _header({"alg": "none"}),
        _header([1]),
        _header({"kid": 5}),
    ]


def _bytes(token: str) -> list[bytes]:
    return [base64.urlsafe_b64decode(part + "==") for part in token.split(".")]


def check(data: bytes) -> None:
    minted, checker = _minted()
    for token in (data.decode("latin-1"), data.decode("utf-8", "surrogateescape")):
        try:
            grant = checker.verify(token, _NOW)
        except TokenError:
            continue
        assert _bytes(token) == _bytes(minted) and grant.session == "s", "a token that nobody minted"
    assert checker.verify(minted, _NOW).allows(85)
