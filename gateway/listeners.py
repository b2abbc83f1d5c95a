"""The instance's listening sockets: opened by the supervisor, as root, and kept open all its life."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from . import files
from .config import ConfigError, Settings

_CHOICES = (443, 8443)
_SEARCH = range(8444, 8544)
UNIX, SYSTEMD = "unix:", "systemd"  # in edge.addresses: a path, or what socket activation passes
_SYSTEMD_FIRST = 3


def listen(address: str, port: int, purpose: str) -> socket.socket:
    """Raises ConfigError that names the port's holder."""
    if address.startswith(UNIX):
        return _listen_unix(Path(address.removeprefix(UNIX)))
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if purpose == "edge":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.listen(4096)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"{address} port {port} ({purpose}) is taken by {holder(port) or 'another process'}: end it, or set {purpose}.port"
            ) from error
        raise ConfigError(f"{address} port {port} ({purpose}): {error.strerror}") from error
    return sock


def _listen_unix(path: Path) -> socket.socket:
    """Replaces a socket that nobody listens on any more. Raises ConfigError."""
    if path.is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise ConfigError(f"{path} (edge) is taken by another process: end it, or set edge.addresses")
        path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        path.chmod(0o666)
        sock.listen(4096)
    except OSError as error:
        sock.close()
        raise ConfigError(f"{path} (edge): {error.strerror}") from error
    return sock


def from_systemd() -> list[socket.socket]:
    """Returns the sockets of socket activation (sd_listen_fds(3)). Raises ConfigError when there are none."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not os.environ.get("LISTEN_FDS", "").isdigit():
        raise ConfigError("edge.addresses names systemd, but no sockets were passed: start torpor by its .socket unit")
    return [socket.socket(fileno=os.dup(number)) for number in range(_SYSTEMD_FIRST, _SYSTEMD_FIRST + int(os.environ["LISTEN_FDS"]))]


def is_inet(address: str) -> bool:
    return address != SYSTEMD and not address.startswith(UNIX)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind(("::1", 0))
        return True
    except OSError:
        return False


def _is_free(addresses: list[str], port: int) -> bool:
    """Whether the port can be bound without SO_REUSEPORT: another instance's listeners count as taken."""
    for address in addresses:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if ":" in address:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind((address, port))
            except OSError:
                return False
    return True


def choose_edge_port(settings: Settings, in_use: bool) -> int:
    """Returns the instance's port: as set, or chosen once and kept. `in_use` says that our own workers still hold it."""
    kept = settings.root / "edge-port"
    addresses = [address for address in edge_addresses(settings) if is_inet(address)]
    port = settings.edge.port or kept_port(kept)
    if port:
        if not in_use and not _is_free(addresses, port):
            raise ConfigError(f"port {port} (edge) is taken by {holder(port) or 'another process'}: end it, or set edge.port")
    else:
        port = next((candidate for candidate in (*_CHOICES, *_SEARCH) if _is_free(addresses, candidate)), 0)
        if not port:
            raise ConfigError("no free port for the edge from 443, 8443 to 8543: set edge.port")
    files.write(kept, str(port).encode(), 0o644)
    return port


def kept_port(kept: Path) -> int:
    """Returns the port that was kept; 0 where none was, or where its file was lost with the host."""
    text = kept.read_bytes() if kept.exists() else b""
    return int(text) if text.isdigit() else 0


def edge_addresses(settings: Settings) -> list[str]:
    """Returns the addresses of endpoints, without those of IPv6 where the host has none."""
    return [address for address in settings.edge.addresses if not is_inet(address) or ":" not in address or has_ipv6()]


def holder(port: int) -> str:
    """Returns in words which process listens on a port; the empty string where none does."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir()):
                name = (process / "comm").read_text(encoding="utf-8").strip()
                return f"{name} (process {process.name})"
        except OSError:
            continue
    return "another process" if inodes else ""
