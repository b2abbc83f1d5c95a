"""One network namespace and one persistent tap per session: made ahead, used by one session, never by another.

All guests look alike (same address, same MAC), so nothing of a link may pass from one tenant to the next. The host's side
has the same fixed MAC everywhere, because the guest's ARP cache is part of its snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog

from gateway import executors
from gateway.config import Egress
from gateway.messages import EgressRules
from gateway.observe.demand import Demand
from gateway.observe.room import descriptors_free, descriptors_kept

from . import syscalls
from .egress import METADATA_ADDRESS, RELAY_PORT, Uplink, accepts_of, link_rules, named_rules
from .errors import VmmError
from .namespaces import apart, destroy_namespace, inside, make_namespace, run_batch, run_nft

HOST_ADDRESS = "169.254.77.1"
GUEST_ADDRESS = "169.254.77.2"
HOST_ADDRESS6 = "fd54:5250:52::1"
GUEST_ADDRESS6 = "fd54:5250:52::2"
HOST_MAC = "02:fc:00:00:00:01"
GUEST_MAC = "02:fc:00:00:00:02"
TAP = "tap0"
_SO_RCVBUFFORCE = 33  # socket(7); Python has no name for it
_NAMES_BYTES = 1 << 20
_METADATA_HOPS = 1  # EC2's default: a container with a network of its own does not get its guest's role

SETUP = f"""\
link set lo up
tuntap add dev {TAP} mode tap vnet_hdr
link set {TAP} address {HOST_MAC}
link set {TAP} addrgenmode none
addr add {HOST_ADDRESS}/30 dev {TAP}
link set {TAP} up
addr add {METADATA_ADDRESS}/32 dev lo
neigh replace {GUEST_ADDRESS} lladdr {GUEST_MAC} dev {TAP} nud permanent
"""
# The way to what listens on ::1. The address is lo's: on the tap it would be announced to the guest at each resume (RFC 3810, 6.1).
SETUP6 = f"""\
addr add {HOST_ADDRESS6}/128 dev lo nodad
route add {GUEST_ADDRESS6}/128 dev {TAP}
neigh replace {GUEST_ADDRESS6} lladdr {GUEST_MAC} dev {TAP} nud permanent
"""
# Of our own ends: a guest's are from 32768 on, and its connections to itself must look like none of ours (vmm/guest/gate.c).
PORTS = "10000 32767"
SOCKETS = 8  # as many as an edge asks for at once
MOST_LINKS = 48
LINK_DESCRIPTORS = SOCKETS + 5  # the guest's services, the relay's listener, and a tap
_NAMESPACE_SECONDS = 120.0  # four of ip and nft in a row, each with its own deadline
_QUIET_SECONDS = 0.6  # after a take: a refill must not compete with the resume that it follows
T = TypeVar("T")
log = structlog.get_logger()


def open_placeholder_tap() -> int:
    """Raises OSError."""
    return apart(lambda: syscalls.open_tap(TAP))  # the descriptor keeps the namespace


@dataclass(frozen=True)
class Link:
    """A session's network: the namespace, pinned by a bind mount at `path`, with the tap in it.

    `services` listen in it for the guest, until control takes them: metadata (TCP), DNS (UDP, TCP).
    """

    path: Path
    services: tuple[socket.socket, ...] = ()

    @property
    def name(self) -> str:
        return self.path.name


class Network:
    """Makes, opens and destroys links under `directory`; namespace work happens on one thread of its own."""

    def __init__(self, directory: Path, egress: Egress, instance: str) -> None:
        self._directory = directory
        self._uplink = Uplink(egress, instance, directory.with_name("uplink"))
        self._thread = executors.Pool("netns", 1, _NAMESPACE_SECONDS)
        self._ready: deque[Link] = deque()
        self._wanted = 0
        self._opens_taps = False
        self._filling: asyncio.Task[None] | None = None
        self._used = 0.0
        self._demand = Demand()
        self._taps: dict[Path, int] = {}  # opened ahead, until somebody takes them
        self._stock: dict[Path, list[socket.socket]] = {}  # the same for what edges connect with
        self._relays: dict[Path, socket.socket] = {}  # listeners, of links whose connectors name hosts
        self._current: set[Path] = set()  # links that know of all of the host's networks
        self._nowhere: int | None = None
        # Never a name that an earlier daemon gave away: a namespace may live on in somebody's socket.
        self._count = secrets.randbelow(900_000)

    def start(self, keep: set[Path], wanted: int, opens_taps: bool = False) -> None:
        """Destroys links that no session in `keep` uses, then keeps `wanted` of them ready, with their taps open where hypervisors take
        a descriptor."""
        self._thread.start()
        self._opens_taps = opens_taps
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            if path not in keep:
                destroy_namespace(path)
            with contextlib.suppress(ValueError):
                self._count = max(self._count, int(path.name))
        try:
            self._uplink.start({path.name for path in keep})
        except OSError as error:
            raise VmmError(f"no way out for microVMs: {error}; egress.closed = true goes without") from error
        self._wanted = wanted
        self._refill()

    async def take(self) -> Link:
        link = self._ready.popleft() if self._ready else await self._call(self._create)
        self._used = asyncio.get_running_loop().time()
        self._demand.note(self._used)
        self._refill()
        return link

    async def release(self, link: Link) -> None:
        """Destroys the link; its tap goes with the last descriptor of the namespace."""
        for one in (*link.services, *self._stock.pop(link.path, ())):
            one.close()
        if link.path in self._relays:
            self._relays.pop(link.path).close()
        tap = self._taps.pop(link.path, None)
        if tap is not None:
            os.close(tap)
        self._current.discard(link.path)
        await self._call(lambda: self._destroy(link.path))

    def _destroy(self, path: Path) -> None:
        destroy_namespace(path)
        self._uplink.detach(path.name)

    async def close(self, is_empty: bool) -> None:
        """With `is_empty`, no microVM runs on, and nothing of the way out stays on the host."""
        if self._filling:
            self._wanted = 0
            await self._filling
        while self._ready:
            await self.release(self._ready.popleft())
        if is_empty and self._uplink.is_open:
            with contextlib.suppress(OSError):
                await self._call(self._uplink.remove)
        if self._nowhere is not None:
            os.close(self._nowhere)
        self._thread.close()

    async def trim(self) -> None:
        """Destroys links that wait and that nobody has lately wanted, and all of them where the host's networks have changed, which are
        closed to microVMs: those that are in use learn of it when their sessions wake. Raises OSError."""
        if await self._call(self._uplink.look_around):
            self._current.clear()
            for link in [self._ready.popleft() for _ in range(len(self._ready))]:
                await self.release(link)
            self._refill()
        while len(self._ready) > self._target:
            await self.release(self._ready.popleft())

    async def tap(self, link: Link) -> int:
        """Returns a descriptor of the link's tap, which is the caller's. Raises OSError."""
        ready = self._taps.pop(link.path, None)
        return ready if ready is not None else await self._call(lambda: inside(link.path, lambda: syscalls.open_tap(TAP)))

    async def placeholder_tap(self) -> int:
        """Returns an open tap that is no session's, in a namespace of its own: it stands in for one in hypervisors that wait."""
        if self._nowhere is None:
            self._nowhere = await self._call(open_placeholder_tap)
        return self._nowhere

    async def enable_egress(self, link: Link, rules: EgressRules) -> None:
        """Opens the link's way out. Raises VmmError."""
        if not self._uplink.is_open:
            return

        def work() -> None:
            if not rules.internet:
                if rules.hosts and link.path not in self._relays:
                    self._relays[link.path] = _listening(HOST_ADDRESS, RELAY_PORT)
                named = named_rules(TAP, GUEST_ADDRESS, (HOST_ADDRESS, METADATA_ADDRESS), rules, self._uplink.closed)
                run_nft(link_rules(TAP, GUEST_ADDRESS, accepts_of(rules), []) + named)
            elif link.path not in self._current:
                run_nft(self._uplink.internet(TAP, GUEST_ADDRESS))
                self._current.add(link.path)
            _set("ipv4/ip_forward", "1")

        try:
            await self._call(lambda: inside(link.path, work))
        except OSError as error:
            raise VmmError(f"the way out could not be opened: {error}") from error

    async def services(self, link: Link, is_named: bool = False) -> list[int]:
        """Returns duplicates of the sockets that listen for the guest. `is_named`: also the one to which its connections to hosts come that
        are allowed by name."""
        made = link.services or await self._call(lambda: inside(link.path, _services))
        if is_named:
            if link.path not in self._relays:
                self._relays[link.path] = await self._call(lambda: inside(link.path, lambda: _listening(HOST_ADDRESS, RELAY_PORT)))
            made = (*made, self._relays[link.path])
        return [os.dup(service.fileno()) for service in made]

    async def sockets(self, link: Link, count: int) -> list[socket.socket]:
        """Returns up to `count` unconnected TCP sockets that live in the session's namespace: whoever holds one can reach that guest only.
        The first ones were made ahead: making some beside a resume would hold up its first connection."""
        stock = self._stock.get(link.path)
        if not stock:
            return await self._call(lambda: inside(link.path, lambda: _sockets(count)))
        self._stock[link.path] = stock[count:]
        return stock[:count]

    async def restock(self, link: Link) -> None:
        """Makes sockets for the next resume of a session that keeps its link. Raises OSError."""
        if self._stock.get(link.path):
            return
        self._stock[link.path] = []
        made = await self._call(lambda: inside(link.path, lambda: _sockets(SOCKETS)))
        if link.path in self._stock:
            self._stock[link.path] += made
            return
        for one in made:  # it was released meanwhile
            one.close()

    async def _call(self, work: Callable[[], T]) -> T:
        return await self._thread.run(work)

    @property
    def _target(self) -> int:
        """By demand, as standbys are: a namespace costs a fresh session some 20 ms. None where descriptors are short."""
        if descriptors_free() < 2 * descriptors_kept():
            return 0
        burst = self._demand.burst(asyncio.get_running_loop().time())
        return max(self._wanted, min(MOST_LINKS, burst)) if self._wanted else 0

    def _refill(self) -> None:
        if self._filling is None or self._filling.done():
            self._filling = asyncio.get_running_loop().create_task(self._fill())

    async def _fill(self) -> None:
        while True:
            quiet = self._used + _QUIET_SECONDS - asyncio.get_running_loop().time()
            if quiet > 0:
                await asyncio.sleep(min(quiet, _QUIET_SECONDS))
                continue
            if len(self._ready) >= self._target:
                return
            try:
                self._ready.append(await self._call(self._create))
            except Exception as error:  # the next take begins again
                log.warning("link.not_made", error=repr(error))
                return

    def _create(self) -> Link:
        """Raises Unavailable, OSError; nothing is left then."""
        self._count += 1
        path = self._directory / f"{self._count:06d}"
        services: list[socket.socket] = []

        def setup() -> None:
            harden()
            commands = SETUP + (SETUP6 if _has_ipv6() else "")
            if self._uplink.is_open:
                commands += self._uplink.attach(path.name, path)
                run_nft(self._uplink.internet(TAP, GUEST_ADDRESS))
                self._current.add(path)
            run_batch(commands)
            _set("ipv4/ip_local_port_range", PORTS)
            services.extend(_services())
            self._stock[path] = _sockets(SOCKETS)
            if self._opens_taps:
                self._taps[path] = syscalls.open_tap(TAP)

        try:
            make_namespace(path, setup)
        except BaseException:
            for one in (*services, *self._stock.pop(path, ())):
                one.close()
            self._current.discard(path)
            self._uplink.detach(path.name)
            raise
        return Link(path, tuple(services))


def harden() -> None:
    """In the calling thread's namespace, before its devices are made: a guest tells its host no routes, and no other way to a host."""
    _set("ipv4/conf/all/accept_redirects", "0")
    _set("ipv4/conf/default/accept_redirects", "0")
    if _has_ipv6():
        _set("ipv6/conf/default/accept_ra", "0")
        _set("ipv6/conf/default/accept_redirects", "0")


def _set(name: str, value: str) -> None:
    Path("/proc/sys/net", name).write_text(value, encoding="ascii")


def _has_ipv6() -> bool:
    """In the calling thread's namespace."""
    try:
        return Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").read_text(encoding="ascii").strip() == "0"
    except OSError:
        return False


def _sockets(count: int) -> list[socket.socket]:
    """Those of IPv6 connect over either (ipv6(7))."""
    made = []
    family = socket.AF_INET6 if _has_ipv6() else socket.AF_INET
    for _ in range(count):
        one = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.append(one)
    return made


def _services() -> tuple[socket.socket, ...]:
    """Metadata, DNS over UDP, DNS over TCP; the guest knows no other address of ours."""
    names = _bound(HOST_ADDRESS, 53, socket.SOCK_DGRAM)
    names.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _NAMES_BYTES)  # a burst of questions waits here until control reads
    credentials = _listening(METADATA_ADDRESS, 80)
    credentials.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, _METADATA_HOPS)
    return credentials, names, _listening(HOST_ADDRESS, 53)


def _listening(address: str, port: int) -> socket.socket:
    one = _bound(address, port, socket.SOCK_STREAM)
    one.listen(64)
    return one


def _bound(address: str, port: int, kind: int) -> socket.socket:
    one = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind((address, port))
    return one
