"""A link with a delay: what is said on one side is heard on the other some time later, as much as there is, in order."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading


class Relay:
    """Connections that `listener` (of any network namespace) accepts go on to `target`, of this process's own."""

    def __init__(self, listener: socket.socket, target: tuple[str, int], one_way_seconds: float) -> None:
        self._listener, self._target, self._delay = listener, target, one_way_seconds
        self.accepted = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result(5)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    async def _serve(self) -> None:
        self._server = await asyncio.start_server(self._connected, sock=self._listener)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        await asyncio.gather(self._carry(reader, far_writer), self._carry(far_reader, writer))

    async def _end(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A link holds whatever is on its way: nothing here waits for the far side to take it."""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 20):
                self._loop.call_later(self._delay, writer.write, data)
        self._loop.call_later(self._delay, writer.close)
