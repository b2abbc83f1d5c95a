"""A mixed load: clients of all kinds at once against one worker, each request's outcome checked."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from load.clients import Abandoned, Answer, Cut, Http1Client, Http2Client, Pace, Request, Target
from load.content import digest, pieces
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

DEADLINE_SECONDS = 60.0
MOST = 16 << 20
_PER_CONNECTION = 60  # requests of a connection of HTTP/2
_TOO_MANY = 429
_BACK_OFF_SECONDS = 0.2
Ask = Callable[[Request], Awaitable[Answer]]


@dataclass
class Load:
    """`target2` has an application that speaks HTTP/2. `is_limited`: a request may be refused with 429. What is wrong is in `faults`, one
    line each."""

    target: Target
    target2: Target
    seed: int
    is_limited: bool
    size_bits: int = 24  # sizes are from 1 byte to 2 to the power of this
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    async def run(self, seconds: float) -> None:
        """Requests until `seconds` are over; then all that are under way are finished and connections are closed."""
        self._until = asyncio.get_running_loop().time() + seconds
        lanes = [self._http1] * 10 + [self._http2] * 4 + [self._messages] * 3
        await asyncio.gather(*(lane(random.Random(self.seed * 1000 + number)) for number, lane in enumerate(lanes)))
        self.seed += 1

    @property
    def _goes_on(self) -> bool:
        return asyncio.get_running_loop().time() < self._until and len(self.faults) < 20

    def _way(self, rng: random.Random, protocol: str) -> tuple[str, Target]:
        """To one application or the other, and what that is called."""
        return (protocol, self.target) if rng.random() < 0.7 else (f"{protocol} to HTTP/2", self.target2)

    async def _http1(self, rng: random.Random) -> None:
        while self._goes_on:
            await self._http1_connection(rng)

    async def _http1_connection(self, rng: random.Random) -> None:
        name, target = self._way(rng, "HTTP/1.1")
        client = Http1Client(target)
        for _ in range(_PER_CONNECTION):
            if not self._goes_on:
                break
            await self._one(name, rng, client.ask)
            if rng.random() < 0.1:
                client.close()
        await self._checked(f"{name}, the last on its connection", Request("/content?seed=1&size=1"), client.ask, (1, 1))
        client.close()

    async def _http2(self, rng: random.Random) -> None:
        while self._goes_on:
            name, target = self._way(rng, "HTTP/2")
            client = Http2Client(target)
            try:
                await client.open()
            except (OSError, ssl.SSLError) as error:
                await self._refused("HTTP/2: connect", error)
                continue
            left = _PER_CONNECTION

            async def stream(client: Http2Client = client, name: str = name) -> None:
                nonlocal left
                while left > 0 and self._goes_on and not client.is_broken:
                    left -= 1
                    await self._one(name, rng, client.ask)

            await asyncio.gather(*(stream() for _ in range(5)))
            if rng.random() < 0.2:
                client.abort()
            else:
                await client.close()

    async def _one(self, protocol: str, rng: random.Random, ask: Ask) -> None:
        kind = rng.choices(list(_KINDS), [weight for weight, _ in _KINDS.values()])[0]
        seed, size = rng.randrange(1 << 30), int(2 ** (rng.random() * self.size_bits))
        request = _KINDS[kind][1](rng, seed, size)
        name = f"{protocol}, {kind}"
        if kind.startswith("client goes"):
            await self._gone(name, request, ask)
        elif kind == "application breaks off":
            await self._broken(name, request, ask)
        else:
            await self._checked(name, request, ask, (seed, size))

    async def _checked(self, name: str, request: Request, ask: Ask, content: tuple[int, int]) -> None:
        """The answer is whole and is the right one."""
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                answer = await ask(request)
        except TimeoutError:
            return self._fault(name, request, f"not answered within {DEADLINE_SECONDS:g} s")
        except (Cut, OSError) as error:
            if self.is_limited and isinstance(error, Cut):
                self.counts[f"{name}: cut"] += 1
                return None
            return self._fault(name, request, repr(error))
        if answer.status == _TOO_MANY and self.is_limited:
            await self._too_many()
            return None
        wanted = digest(*content)
        got = answer.body.decode("latin-1") if request.path.startswith("/digest") else answer.digest
        if answer.status != 200 or got != wanted:
            return self._fault(name, request, f"status {answer.status}, {answer.size} bytes, digest {got[:12]}, not {wanted[:12]}")
        self.counts[name] += 1
        return None

    async def _gone(self, name: str, request: Request, ask: Ask) -> None:
        """The client leaves in the middle."""
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                answer = await ask(request)
        except Abandoned:
            self.counts[name] += 1
        except TimeoutError:
            self._fault(name, request, f"nothing within {DEADLINE_SECONDS:g} s")
        except (Cut, OSError) as error:
            self._fault(name, request, repr(error))
        else:
            if answer.status != _TOO_MANY or not self.is_limited:
                self._fault(name, request, f"status {answer.status} before its client had gone")

    async def _broken(self, name: str, request: Request, ask: Ask) -> None:
        """The answer does not come whole: cut, or 502 where nothing of it had been passed on."""
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                answer = await ask(request)
        except (Cut, OSError):
            self.counts[name] += 1
        except TimeoutError:
            self._fault(name, request, f"not cut within {DEADLINE_SECONDS:g} s")
        else:
            if answer.status == 502 or (answer.status == _TOO_MANY and self.is_limited):
                self.counts[name] += 1
            else:
                self._fault(name, request, f"status {answer.status} with {answer.size} bytes, though it never ended")

    async def _messages(self, rng: random.Random) -> None:
        context = ssl.create_default_context(cafile=self.target.authority)
        while self._goes_on:
            try:
                async with asyncio.timeout(DEADLINE_SECONDS):
                    socket = await connect(
                        f"wss://{self.target.host}:{self.target.port}/", host="127.0.0.1", port=self.target.port, ssl=context,
                        additional_headers=self.target.fields, max_size=None, compression=None,
                    )  # fmt: skip
                    try:
                        await self._conversation(rng, socket)
                    finally:
                        await socket.close()
            except TimeoutError:
                self.faults.append(f"WebSocket: nothing within {DEADLINE_SECONDS:g} s")
            except (InvalidStatus, ConnectionClosed, OSError) as error:
                await self._refused("WebSocket", error)

    async def _conversation(self, rng: random.Random, socket: ClientConnection) -> None:
        for _ in range(rng.randrange(1, 40)):
            seed, size = rng.randrange(1 << 30), int(2 ** (rng.random() * 20))
            message = b"".join(pieces(seed, size))
            sending = asyncio.create_task(socket.send(message))
            if await socket.recv() != message:
                self.faults.append(f"WebSocket: another message than that of seed {seed} and {size} bytes")
            await sending
            self.counts["WebSocket message"] += 1
        if rng.random() < 0.2:
            socket.transport.abort()
            self.counts["WebSocket reset"] += 1

    async def _too_many(self) -> None:
        self.counts["429"] += 1
        await asyncio.sleep(_BACK_OFF_SECONDS)

    async def _refused(self, name: str, error: Exception) -> None:
        if self.is_limited and not (isinstance(error, InvalidStatus) and error.response.status_code != _TOO_MANY):
            await self._too_many()
        else:
            self.faults.append(f"{name}: {error!r}")

    def _fault(self, name: str, request: Request, text: str) -> None:
        self.faults.append(f"{name}: {text}: {request}")


def _download(rng: random.Random, seed: int, size: int) -> Request:
    return Request(f"/content?seed={seed}&size={size}&chunked={rng.randrange(2)}&pause_ms={rng.choice((0, 0, 0, 50))}")


def _slow_download(rng: random.Random, seed: int, size: int) -> Request:
    return Request(f"/content?seed={seed}&size={size}&chunked={rng.randrange(2)}", reading=Pace(0.05, 30, 4096))


def _upload(rng: random.Random, seed: int, size: int) -> Request:
    return Request("/digest", (seed, size), bool(rng.randrange(2)))


def _slow_upload(rng: random.Random, seed: int, size: int) -> Request:
    return Request("/digest", (seed, size), bool(rng.randrange(2)), writing=Pace(0.05, 30, 4096))


def _slowly_taken(rng: random.Random, seed: int, size: int) -> Request:
    return Request("/digest?pause_ms=5", (seed, size))


def _echo(rng: random.Random, seed: int, size: int) -> Request:
    return Request("/echo", (seed, size), bool(rng.randrange(2)), reading=Pace(0.02, 10) if rng.randrange(2) else None)


def _left_download(rng: random.Random, seed: int, size: int) -> Request:
    return Request(f"/content?seed={seed}&size={MOST}", abandon_at=min(size, MOST // 2))


def _left_upload(rng: random.Random, seed: int, size: int) -> Request:
    return Request("/digest", (seed, MOST), bool(rng.randrange(2)), abandon_at=min(size, MOST // 2))


def _break(rng: random.Random, seed: int, size: int) -> Request:
    return Request(f"/break?seed={seed}&size={size}&chunked={rng.randrange(2)}")


# What is asked for, how often, and how.
_KINDS: dict[str, tuple[int, Callable[[random.Random, int, int], Request]]] = {
    "download": (30, _download),
    "slow reader": (10, _slow_download),
    "upload": (20, _upload),
    "slow writer": (10, _slow_upload),
    "slow application": (5, _slowly_taken),
    "echo": (10, _echo),
    "client goes while it reads": (5, _left_download),
    "client goes while it writes": (5, _left_upload),
    "application breaks off": (5, _break),
}
