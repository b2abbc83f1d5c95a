"""Unconnected sockets that live in one session's network namespace: vmm hands them out, a few ahead, and the worker connects them.

A connect costs no call then, and whoever holds such a socket can reach that one guest and nothing else.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import deque

from gateway.messages import SocketsRequest
from gateway.rpc import Client, RpcError, RpcLost

_STOCK = 8
_VMM_SECONDS = 10.0  # a vmm that is restarted is there again within two or three


class SessionGone(Exception):
    """The route is stale: vmm has no such incarnation, or has it no more."""


class Sockets:
    """The unconnected sockets of one incarnation. This object owns their descriptors until `take` gives one away or `close` closes
    them."""

    def __init__(self, vmm: Client, session: str, incarnation: int) -> None:
        self._vmm = vmm
        self._request = SocketsRequest(session, incarnation, _STOCK)
        self._stock: deque[int] = deque()
        self._fetching: asyncio.Task[None] | None = None
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._stock)

    async def take(self) -> socket.socket:
        """Gives away one, and waits for vmm where none is left. Raises OSError, SessionGone."""
        while True:
            if len(self._stock) <= _STOCK // 4:
                task = self._fetch_more()
                if not self._stock:
                    await asyncio.shield(task)
                    continue
            sock = socket.socket(fileno=self._stock.popleft())
            sock.setblocking(False)
            return sock

    def prefetch(self) -> None:
        """Begins to fetch sockets, so that the first request need not wait for vmm."""
        if not self._stock and not self._is_closed:
            self._fetch_more()

    def _fetch_more(self) -> asyncio.Task[None]:
        if self._fetching is None:
            self._fetching = asyncio.get_running_loop().create_task(self._fetch())
            self._fetching.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._fetching

    async def _fetch(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + _VMM_SECONDS
        try:
            while True:
                if self._is_closed:
                    raise SessionGone("the MicroVM was suspended, or has ended")
                try:
                    _, descriptors = await self._vmm.call_with_descriptors("sockets", self._request, timeout=5.0)
                    break
                except RpcLost:  # it is being restarted
                    if loop.time() > until:
                        raise
        except RpcError as error:
            if error.kind == "Ended":
                raise SessionGone(str(error)) from error
            raise OSError(errno.EHOSTDOWN, str(error)) from error
        finally:
            self._fetching = None
        self._stock.extend(descriptors)
        if self._is_closed:
            self.close()
            raise SessionGone("the MicroVM was suspended, or has ended")

    def abort(self) -> None:
        """Closes, and does not wait for a fetch that is under way: the worker ends."""
        if self._fetching is not None:
            self._fetching.cancel()
        self.close()

    def close(self) -> None:
        """The incarnation has ended: its sockets, those on their way included, keep its network namespace alive no longer."""
        self._is_closed = True
        while self._stock:
            os.close(self._stock.popleft())
