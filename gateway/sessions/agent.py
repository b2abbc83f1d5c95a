"""The agent's channel: frames to and from a guest's init (vmm/guest/port.h). What it says is a guest's word."""

from __future__ import annotations

import asyncio
import os
import secrets
import struct
from collections.abc import Callable, Iterable

import structlog

from gateway.messages import AGENT_PROTOCOL

from . import listeners, out_of_memory
from .allowance import Allowance
from .frame import HEADER, MAGIC, MAGIC_BYTES, frame
from .shells import Shells

log = structlog.get_logger()

_HELLO, _WAKE, _CONFIG, _START, _SYNC, _STOP, _LISTENERS = 0x01, 0x02, 0x03, 0x04, 0x0A, 0x0B, 0x0C
_IS_HELLO, _WOKEN, _OUTPUT, _EXIT = 0x81, 0x82, 0x83, 0x84
_SHELL_OUTPUT, _SHELL_TAKEN, _SHELL_EXIT, _KILLED, _LISTENING = 0x85, 0x86, 0x87, 0x88, 0x89
EXITED = 2  # of an application's states
_HELLO_BYTES = 20  # from protocol 2 on; a later one may say more
_FRAME_MAX_IN = 4096
_FRAME_MAX_OUT = 16384
_BUDGET_BYTES = 65536  # read per session and loop turn, so that a chatty guest starves nobody
_CHANNELS = (1, 2, 3)  # of an application's output (vmm/guest/port.h)
_FRAMES_AT_ONCE, _FRAMES_A_SECOND = 40_000, 20_000  # of one guest; beyond, it is heard later, as one that writes faster than we read
_KILLED_AT_ONCE, _KILLED_A_SECOND = 32, 1.0  # lines about processes that a guest's kernel has killed
_UNREAD_BYTES = 8 << 20  # sent to a guest that does not read: it is not heard until it has
_STOP_ANSWER_SECONDS = 1.0  # guests of older images know no such order, and do not answer
_RESYNC = b"\0" * (_FRAME_MAX_IN + HEADER.size)


class AgentError(Exception):
    """The agent did not answer in time, or its channel closed."""


def wake_frame(nonce: int, reset_tcp: bool = True, wall_ns: int = 0) -> bytes:
    """Makes the frame that tells a restored guest what to do. vmm stamps the wall clock (the first field) just before a session's guest
    runs. Connections to the outside are reset where there can be any; looking for them costs an emulated guest some 20 ms."""
    return frame(_WAKE, struct.pack("<QQI", wall_ns, nonce, reset_tcp) + os.urandom(64))


def sync_frame(nonce: int) -> bytes:
    """Makes the frame that has a guest write its dirty pages to its disk, before an image is made of it: each of its clones would write
    them, to a disk of its own."""
    return frame(_SYNC, struct.pack("<Q", nonce))


def start_frames(entries: Iterable[tuple[str, str]]) -> list[bytes]:
    """Makes the frames that carry the application's configuration, in pieces, then the order to start it."""
    text = b"".join(f"{name}={value}".encode() + b"\0" for name, value in entries)
    return [frame(_CONFIG, text[at : at + _FRAME_MAX_IN]) for at in range(0, len(text), _FRAME_MAX_IN)] + [frame(_START)]


class Agent:
    """A connection to a guest's agent; it lasts until `close` or the hypervisor's end."""

    def __init__(
        self, descriptor: int, on_output: Callable[[int, bytes], None], on_exit: Callable[[int], None],
        on_killed: Callable[[str], None] = lambda line: None, on_lost: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """`on_killed` is called with a line that says which process the guest's kernel killed for want of memory. `on_lost` is called when
        the channel has ended, and says whether another one will be attached."""
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._on_output = on_output
        self._on_exit = on_exit
        self._on_killed = on_killed
        self._on_lost = on_lost
        self._buffer = bytearray()
        self._nonces: dict[int, asyncio.Future[bytes]] = {}
        self._out = bytearray()
        self._holds = False
        self._is_deaf = False  # the guest is not read until it has read
        self._later: asyncio.TimerHandle | None = None  # when it is read again, which has said too much
        self._frames = Allowance(_FRAMES_AT_ONCE, _FRAMES_A_SECOND, self._loop.time)
        self._kills = Allowance(_KILLED_AT_ONCE, _KILLED_A_SECOND, self._loop.time)
        self._has_failed = False
        self.shells = Shells(self.send)
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._exited = asyncio.Event()
        self.protocol = 1  # until it says another
        self._loop.add_reader(descriptor, self._readable)

    def expect(self, nonce: int) -> asyncio.Future[bytes]:
        """Returns a future of the answer to the HELLO or WAKE that carries this nonce."""
        future: asyncio.Future[bytes] = self._loop.create_future()
        self._nonces[nonce] = future
        return future

    async def hello(self, seconds: float) -> tuple[int, int]:
        """Synchronises with the agent; returns the application's state (0 none, 1 running, 2 exited) and exit code.

        Raises AgentError when it does not answer in time, or speaks a protocol that is newer than we are.
        """
        answer = await self._hello(seconds, _RESYNC)
        _, state, code = struct.unpack_from("<QIi", answer)
        (self.protocol,) = struct.unpack_from("<I", answer, 16) if len(answer) >= _HELLO_BYTES else (1,)
        if self.protocol > AGENT_PROTOCOL:
            raise AgentError(
                f"the guest's agent speaks protocol {self.protocol}, and this version of Torpor knows those up to {AGENT_PROTOCOL}: "
                f"start the newer version again"
            )
        return state, code

    async def listeners(self, seconds: float) -> list[listeners.Listener]:
        """Asks which TCP sockets listen. Raises AgentError when it does not answer in time, as guests of older images do not."""
        return listeners.parse((await self._ask(_LISTENERS, seconds))[8:])

    async def _hello(self, seconds: float, before: bytes = b"") -> bytes:
        return await self._ask(_HELLO, seconds, before)

    async def _ask(self, kind: int, seconds: float, before: bytes = b"") -> bytes:
        nonce = secrets.randbits(63)
        future = self.expect(nonce)
        self.send(before + frame(kind, struct.pack("<Q", nonce)))
        try:
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError as error:
            self._nonces.pop(nonce, None)
            raise AgentError(f"the guest's agent did not answer in {seconds:g} s") from error

    async def stop(self, seconds: float) -> None:
        """Has the application sent its stop signal, and returns when it has ended, when its time is up, or at once where nothing in it
        heeds that signal. Raises AgentError when the channel closes."""
        nonce = secrets.randbits(63)
        future = self.expect(nonce)
        self.send(frame(_STOP, struct.pack("<Q", nonce)))
        try:
            async with asyncio.timeout(_STOP_ANSWER_SECONDS):
                answer = await future
            if len(answer) < 16 or not struct.unpack_from("<I", answer, 8)[0]:
                return
            async with asyncio.timeout(seconds):
                await self._exited.wait()
        except TimeoutError:
            return

    # ---- through a suspend, where shells are parked: the guest keeps its side of each in its memory ----

    async def quiet(self, seconds: float) -> None:
        """Returns when the guest has taken what was sent, and we what it had said by then. What is sent from now on waits, until
        `attach` or `release`: a guest that is stopped would not take it. Raises AgentError."""
        await self._hello(seconds)
        self._holds = True

    def release(self) -> None:
        """Sends what was held back: the suspend was called off, or there is a channel again."""
        self._holds = False
        self._writable()

    async def is_heard(self, seconds: float) -> bool:
        """Whether the guest answers over this channel in time. What is held back stays held back."""
        if self._descriptor < 0:
            return False
        nonce = secrets.randbits(63)
        future = self.expect(nonce)
        data = frame(_HELLO, struct.pack("<Q", nonce))
        try:
            if self._holds:  # from `quiet` on, between two frames
                os.write(self._descriptor, data)
            else:
                self.send(data)
            async with asyncio.timeout(seconds):
                await future
        except (OSError, TimeoutError, AgentError):
            self._nonces.pop(nonce, None)
            return False
        return True

    @property
    def is_detached(self) -> bool:
        """Whether it waits for the channel of the next incarnation."""
        return self._descriptor < 0 and not self.closed.done()

    def detach(self) -> None:
        """Closes the channel of a guest that sleeps, once all of it is read; what is sent meanwhile waits."""
        self._holds = True
        self._frames = Allowance(_FRAMES_AT_ONCE, _FRAMES_A_SECOND, self._loop.time)  # it is stopped: what is left ends
        while self._descriptor >= 0 and self._read():
            pass
        self._drop()

    def attach(self, descriptor: int) -> None:
        """Goes on over the channel of the next incarnation: what the guest says continues where it stopped."""
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._loop.add_reader(descriptor, self._readable)
        self.release()

    def _drop(self) -> None:
        self._is_deaf = False
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            self._loop.remove_writer(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def send(self, data: bytes) -> None:
        self._out += data
        self._writable()
        if len(self._out) > _UNREAD_BYTES and not self._is_deaf and self._descriptor >= 0:
            self._is_deaf = True
            log.warning("agent.does_not_read", bytes=len(self._out))
            self._loop.remove_reader(self._descriptor)

    def close(self) -> None:
        if self.closed.done():
            return
        self._drop()
        self.closed.set_result(None)
        self._exited.set()  # nobody waits for what cannot come any more
        self.shells.close()
        self._answer_nobody()

    def _answer_nobody(self) -> None:
        """What was asked over a channel that has ended is not answered any more."""
        for future in self._nonces.values():
            if not future.done():
                future.set_exception(AgentError("the agent's channel closed"))
                future.exception()
        self._nonces.clear()

    def _lost(self) -> None:
        """The channel's end says nothing about the guest. From `quiet` on the next channel goes on: a snapshot may end one (Firecracker's
        vsock), and the guest runs on, or sleeps."""
        if self._holds or self._on_lost():
            self._holds = True
            self._drop()
            self._answer_nobody()
        else:
            self.close()

    def _writable(self) -> None:
        if self._descriptor < 0 or self._holds:
            return
        try:
            while self._out:
                del self._out[: os.write(self._descriptor, self._out[:_BUDGET_BYTES])]
        except BlockingIOError:
            self._loop.add_writer(self._descriptor, self._writable)
            return
        except OSError:
            self._lost()
            return
        self._loop.remove_writer(self._descriptor)
        if self._is_deaf:
            self._is_deaf = False
            self._listen()

    def _listen(self) -> None:
        """Reads the guest again, where nothing else keeps it from being read."""
        self._later = None
        if self._descriptor >= 0 and not self._is_deaf:
            self._loop.add_reader(self._descriptor, self._readable)

    def _readable(self) -> None:
        if self._read() is None:
            self._lost()
        elif self._descriptor >= 0 and self._later is None and (seconds := self._frames.spend(0)):
            self._loop.remove_reader(self._descriptor)
            self._later = self._loop.call_later(seconds, self._listen)

    def _read(self) -> int | None:
        """Reads what is there; returns how many bytes, None at the channel's end."""
        try:
            data = os.read(self._descriptor, _BUDGET_BYTES)
        except BlockingIOError:
            return 0
        except OSError:
            return None
        if not data:
            return None
        self._buffer += data
        self._parse()
        return len(data)

    def _parse(self) -> None:
        """Handles whole frames, and skips what is not a frame: the first bytes of a new channel may be the rest of an old one."""
        at, end = 0, len(self._buffer)
        try:
            while end - at >= HEADER.size:
                magic, kind, _, channel, length = HEADER.unpack_from(self._buffer, at)
                if magic != MAGIC or length > _FRAME_MAX_OUT:
                    found = self._buffer.find(MAGIC_BYTES, at + 1)
                    at = found if found >= 0 else max(at, end - 3)
                    if found < 0:
                        break
                    continue
                if end - at < HEADER.size + length:
                    break
                payload = bytes(self._buffer[at + HEADER.size : at + HEADER.size + length])
                at += HEADER.size + length
                self._frames.spend(1)
                self._frame_safely(kind, channel, payload)
        finally:  # also of what a callback raised: a frame is taken once
            del self._buffer[:at]

    def _frame_safely(self, kind: int, channel: int, payload: bytes) -> None:
        """What a frame makes of us is that frame's affair: those after it are heard. It is logged once: a guest can say it for ever."""
        try:
            self._frame(kind, channel, payload)
        except Exception:
            if not self._has_failed:
                self._has_failed = True
                log.exception("agent.frame_failed", kind=kind)

    def _frame(self, kind: int, channel: int, payload: bytes) -> None:
        if (kind in (_IS_HELLO, _WOKEN) and (len(payload) in (8, 16) or len(payload) >= _HELLO_BYTES)) or (
            kind == _LISTENING and len(payload) >= 8
        ):
            future = self._nonces.pop(struct.unpack_from("<Q", payload)[0], None)
            if future is not None and not future.done():
                future.set_result(payload)
        elif kind == _OUTPUT:
            if channel in _CHANNELS:
                self._on_output(channel, payload)
        elif kind == _EXIT and len(payload) == 4:
            if not self._exited.is_set():
                self._exited.set()
                self._on_exit(struct.unpack("<i", payload)[0])
        elif kind == _KILLED and self._kills.take():
            self._on_killed(out_of_memory.line_of(payload))
        elif kind == _SHELL_OUTPUT:
            self.shells.output(channel, payload)
        elif kind == _SHELL_TAKEN and len(payload) == 4:
            self.shells.taken(channel, struct.unpack("<I", payload)[0])
        elif kind == _SHELL_EXIT and len(payload) == 4:
            self.shells.exited(channel, struct.unpack("<i", payload)[0])
