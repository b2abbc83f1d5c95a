"""The network of a container build: slirp4netns in a namespace of the build's own, and rules of what it reaches.

Private ranges, metadata addresses and what is the host's own are closed, but for the hosts of package mirrors and registries that the
host's settings name.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import ipaddress
import os
import signal
import socket
import subprocess
from collections.abc import Collection
from pathlib import Path

from gateway import descriptors
from gateway.addresses import CLOSED

from .egress import addresses_here, networks_here
from .errors import VmmError
from .sandboxes import QUOTED_CHARACTERS

_START_SECONDS = 10
_DNS = "10.0.2.3"  # slirp4netns's own
_DEVICE = "eth0"  # as steps have it under Docker


class Child:
    """A process that is killed by its descriptor: by the time, its number may be another's."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._pidfd: int | None = None
        with contextlib.suppress(ProcessLookupError):  # it has ended, and was waited for
            self._pidfd = os.pidfd_open(process.pid)

    async def wait(self) -> int:
        return await self._process.wait()

    def kill(self) -> None:
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = None


def _pipe(opened: contextlib.ExitStack) -> tuple[io.FileIO, io.FileIO]:
    out, into = os.pipe2(os.O_CLOEXEC)
    return opened.enter_context(io.FileIO(out, "rb")), opened.enter_context(io.FileIO(into, "wb"))


class BuildNetwork:
    """slirp4netns for one namespace. What it says of itself is written to the file `said`."""

    def __init__(self, namespace: Path, said: Path) -> None:
        self._namespace, self._said = namespace, said
        self._tether: int | None = None  # a pipe's end: when it closes, however the daemon ends, the network ends
        self.child: Child | None = None

    async def start(self) -> None:
        """Raises VmmError with slirp4netns's own words, OSError."""
        with contextlib.ExitStack() as opened:
            ready_out, ready_in = _pipe(opened)
            tethered, self._tether = os.pipe2(os.O_CLOEXEC)
            opened.callback(os.close, tethered)
            words = opened.enter_context(self._said.open("wb"))
            # Its sandbox detaches what is mounted below "/", and where a mount is shared (/run/netns of ip-netns(8)), the
            # host's too: it gets mounts of its own.
            process = await asyncio.create_subprocess_exec(
                "unshare", "--mount", "--propagation=private",
                "slirp4netns", "--configure", "--mtu=65520", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp",
                "--netns-type=path", f"--ready-fd={ready_in.fileno()}", f"--exit-fd={tethered}", str(self._namespace), _DEVICE,
                pass_fds=[ready_in.fileno(), tethered], stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
                stderr=words, start_new_session=True,
            )  # fmt: skip
            self.child = Child(process)
            ready_in.close()
            ready = b""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_START_SECONDS):
                    await descriptors.readable(ready_out.fileno())
                ready = ready_out.read(1)
        if not ready:
            said = self._said.read_text(encoding="utf-8", errors="replace").strip()[-QUOTED_CHARACTERS:]
            raise VmmError(f"slirp4netns did not start, and the build has no network: {said or f'not within {_START_SECONDS} s'}")

    def close(self) -> None:
        """Ends it; `child` has yet to be waited for."""
        if self._tether is not None:
            os.close(self._tether)
            self._tether = None
        if self.child is not None:
            self.child.kill()


def close_private(namespace: Path, hosts: Collection[str]) -> None:
    """Loads the rules of a build's namespace; `hosts` are reached although their addresses may be private. Raises OSError,
    SubprocessError."""
    allowed = {_DNS}
    for name in hosts:
        with contextlib.suppress(OSError):
            allowed |= {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET)}
    own = [address for found in addresses_here().values() for address in found]
    rules = network_rules(allowed, [*CLOSED, *networks_here(), *own])
    subprocess.run(["nsenter", f"--net={namespace}", "nft", "-f", "-"], input=rules.encode(), check=True, capture_output=True, timeout=20)


def network_rules(allowed: Collection[str], closed: Collection[str]) -> str:
    """Returns for nft what a build reaches. `closed` may overlap, which nft's sets may not."""
    merged = ipaddress.collapse_addresses(ipaddress.IPv4Network(one) for one in closed)
    return (
        "table inet build {\nchain out {\ntype filter hook output priority 0;\n"
        f"oif lo accept\nip daddr {{ {', '.join(sorted(allowed))} }} accept\n"
        f"ip daddr {{ {', '.join(map(str, merged))} }} reject\nmeta nfproto ipv6 reject\n}}\n}}\n"
    )
