"""What systemd is told (sd_notify(3)): one datagram to the socket that the unit's process finds named in its environment."""

from __future__ import annotations

import contextlib
import os
import socket
import time


def tell(*lines: str) -> None:
    """Sends `NAME=value` lines; nothing happens where nobody asked for them."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.sendto("\n".join(lines).encode(), "\0" + address[1:] if address[0] == "@" else address)


def reloading() -> None:
    """READY=1 has to follow, whatever became of the reload."""
    tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def watchdog_seconds() -> float | None:
    """Returns how often WATCHDOG=1 has to be sent at least (sd_watchdog_enabled(3)); None where nobody waits for it."""
    wanted, meant = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not wanted.isdigit() or int(wanted) == 0 or (meant and meant != str(os.getpid())):
        return None
    return int(wanted) / 1e6
