"""Frames between processes (gateway/rpc.py): what a peer that was taken over says, to the side that serves and to the one that has asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from typing import Any

import msgspec

from gateway import rpc

TRACED = ("gateway.rpc",)
WORDS = (
    b"\x96",
    b"\x95",
    b"\xa4echo",
    b"\xa4take",
    b"\xa3any",
    b"\xc0",
    b"\x00",
    b"\xcb" + bytes(8),
    b"\x91" * 1500,
    b"\x81\xa1a" * 700,
    b"\xff" * 4,
)
_loop = asyncio.new_event_loop()


class _Ref(msgspec.Struct):
    session: str
    incarnation: int


class _Target:
    async def rpc_echo(self, connection: rpc.Connection, body: _Ref) -> _Ref:
        return body

    async def rpc_any(self, connection: rpc.Connection, body: Any) -> None:
        return None

    async def rpc_take(self, connection: rpc.Connection, body: None, descriptors: list[int]) -> None:
        for descriptor in descriptors:
            os.close(descriptor)


_SERVICE = rpc.Service(_Target())


def framed(*values: Any) -> bytes:
    data = msgspec.msgpack.encode(values)
    return struct.pack("<I", len(data)) + data


_WHOLE = framed(0, 99, "echo", 0, {"session": "s", "incarnation": 1}, 0.0)


def seeds() -> list[bytes]:
    return [
        _WHOLE, framed(0, 1, "any", 0, [1, {"a": [None, 2.5]}]), framed(0, 2, "take", 0, None), framed(3, 0, "any", 0, "x"), framed(0, 3, "none", 0, None),
        framed(1, 1, "", 0, {"session": "s", "incarnation": 1}), framed(2, 1, "", 0, ["NotFound", "text"]), framed(2, 1, "", 0, ["CancelledError", "text"]),
        framed(1, 1, "", 1, None), _WHOLE + framed(3, 0, "any", 0, b"xyz") + _WHOLE, framed(0, 4, "take", 2, None),
    ]  # fmt: skip


def check(data: bytes) -> None:
    _loop.run_until_complete(_said(data))
    if data[:4] != struct.pack("<I", max(0, len(data) - 4)):  # mutations seldom keep a length true
        _loop.run_until_complete(_said(struct.pack("<I", len(data)) + data))


async def _said(data: bytes) -> None:
    raised: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: raised.append(context))
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    one = rpc.Connection(ours, _SERVICE)
    call = asyncio.ensure_future(one.call("echo", None, _Ref, timeout=5))
    try:
        await asyncio.sleep(0)
        theirs.recv(1 << 16)
        theirs.send(data)
        one._readable()
        is_between = not one._in and not one.closed.done()
        for _ in range(4):
            await asyncio.sleep(0)
        if is_between and not one.closed.done():
            with contextlib.suppress(BlockingIOError):
                theirs.recv(1 << 16)
            theirs.send(_WHOLE)
            for _ in range(6):
                await asyncio.sleep(0)
            assert b"incarnation" in theirs.recv(1 << 16), "the next request is not answered"
        assert one.closed.done() or len(one._in) <= len(data)
        assert not raised, raised[0]
    finally:
        one.close()
        theirs.close()
        call.cancel()
        error = (await asyncio.gather(call, return_exceptions=True))[0]
    assert isinstance(error, rpc.RpcError | asyncio.CancelledError | _Ref), repr(error)
