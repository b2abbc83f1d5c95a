"""Who is let in by the embedded object store: as by the API (gateway/api/connections.py), for a server that has a thread for each
connection and closes it after one answer."""

from __future__ import annotations

import asyncio
import functools
import socket
from typing import Any

from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from .api.connections import Connections, Visit, holder, shut

_ADMIT_SECONDS = 10.0


class BoundedServer(ThreadedWSGIServer):
    """`connections` are counted by `loop`, which another thread runs."""

    def __init__(
        self, sock: socket.socket, app: Any, handler: type[WSGIRequestHandler], connections: Connections, loop: asyncio.AbstractEventLoop
    ) -> None:
        host, port = sock.getsockname()[:2]
        super().__init__(host, port, app, handler, fd=sock.fileno())
        self._connections = connections
        self._loop = loop
        self._visits: dict[socket.socket, Visit] = {}

    def process_request(self, request: Any, client_address: Any) -> None:
        """Raises TimeoutError, RuntimeError where no thread can be had: the connection is closed then."""
        admitted = asyncio.run_coroutine_threadsafe(self._admit(request, str(client_address[0])), self._loop)
        visit = admitted.result(_ADMIT_SECONDS)
        if visit is None:
            self.shutdown_request(request)
            return
        self._visits[request] = visit
        super().process_request(request, client_address)

    async def _admit(self, sock: socket.socket, address: str) -> Visit | None:
        return self._connections.admit(holder(address), functools.partial(shut, sock))

    def verified(self, environ: dict[str, Any]) -> None:
        """Who asks has shown who he is."""
        visit = self._visits.get(environ["werkzeug.socket"])
        if visit is not None:
            self._loop.call_soon_threadsafe(self._connections.shown, visit)

    def shutdown_request(self, request: Any) -> None:
        visit = self._visits.pop(request, None)
        if visit is not None:
            self._loop.call_soon_threadsafe(self._connections.leave, visit)
        super().shutdown_request(request)
