"""Listening sockets: what is asked for, what is taken, what is kept."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import listeners
from gateway.config import ConfigError, Settings


@pytest.fixture
def opened() -> Iterator[list[socket.socket]]:
    """Sockets that are closed at the end."""
    sockets: list[socket.socket] = []
    yield sockets
    for sock in sockets:
        sock.close()


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def test_workers_share_a_port_and_the_api_does_not(opened: list[socket.socket]) -> None:
    opened.append(listeners.listen("127.0.0.1", 0, "edge"))
    opened.append(listeners.listen("127.0.0.1", port_of(opened[0]), "edge"))
    opened.append(listeners.listen("127.0.0.1", 0, "api"))
    with pytest.raises(ConfigError, match=rf"port {port_of(opened[2])} \(api\) is taken by .*process {os.getpid()}.*set api.port"):
        listeners.listen("127.0.0.1", port_of(opened[2]), "api")


def test_an_address_of_ipv6_leaves_the_port_of_ipv4_free(opened: list[socket.socket]) -> None:
    if not listeners.has_ipv6():
        pytest.skip("no IPv6")
    with socket.create_server(("127.0.0.1", 0)) as free:  # a port of IPv4 that no other process takes meanwhile
        port = port_of(free)
        opened.append(listeners.listen("::", port, "api"))
    opened.append(listeners.listen("127.0.0.1", port, "api"))


def test_an_address_that_is_not_here_is_named() -> None:
    with pytest.raises(ConfigError, match=r"192.0.2.1 port 1 .*Cannot assign"):
        listeners.listen("192.0.2.1", 1, "api")


def test_a_path_that_nobody_listens_on_is_taken_over(tmp_path: Path, opened: list[socket.socket]) -> None:
    address = f"unix:{tmp_path}/edge.sock"
    listeners.listen(address, 0, "edge").close()
    opened.append(listeners.listen(address, 0, "edge"))
    assert (tmp_path / "edge.sock").stat().st_mode & 0o777 == 0o666
    with pytest.raises(ConfigError, match="taken by another process"):
        listeners.listen(address, 0, "edge")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Address already in use"):
        listeners.listen(f"unix:{tmp_path}/file", 0, "edge")
    assert (tmp_path / "file").read_text() == "", "what is not a socket stays"


def test_sockets_of_a_socket_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no sockets were passed"):
        listeners.from_systemd()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(listeners, "_SYSTEMD_FIRST", listener.fileno())
        monkeypatch.setenv("LISTEN_FDS", "1")
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        (one,) = listeners.from_systemd()
        assert one.getsockname() == listener.getsockname() and one.fileno() != listener.fileno()
        one.close()
        monkeypatch.setenv("LISTEN_PID", "1")
        with pytest.raises(ConfigError):
            listeners.from_systemd()


def settings_of(tmp_path: Path, **edge: object) -> Settings:
    return Settings(root=tmp_path, edge={"addresses": ["127.0.0.1"], **edge})  # type: ignore[arg-type]


def test_the_edges_port_is_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[socket.socket]) -> None:
    opened.append(listeners.listen("127.0.0.1", 0, "api"))
    taken = port_of(opened[0])
    with listeners.listen("127.0.0.1", 0, "api") as sock:
        free = port_of(sock)
    monkeypatch.setattr(listeners, "_SEARCH", ())
    monkeypatch.setattr(listeners, "_CHOICES", (taken,))
    with pytest.raises(ConfigError, match="no free port"):
        listeners.choose_edge_port(settings_of(tmp_path), in_use=False)
    monkeypatch.setattr(listeners, "_CHOICES", (taken, free))
    assert listeners.choose_edge_port(settings_of(tmp_path), in_use=False) == free
    monkeypatch.setattr(listeners, "_CHOICES", (taken,))
    assert listeners.choose_edge_port(settings_of(tmp_path), in_use=False) == free, "kept for the instance"
    (tmp_path / "edge-port").write_text("")  # a host that stopped while it was written
    monkeypatch.setattr(listeners, "_CHOICES", (free,))
    assert listeners.choose_edge_port(settings_of(tmp_path), in_use=False) == free


def test_a_kept_port_is_used_again_and_must_be_free(tmp_path: Path, opened: list[socket.socket]) -> None:
    opened.append(listeners.listen("127.0.0.1", 0, "edge"))
    port = port_of(opened[0])
    (tmp_path / "edge-port").write_text(str(port))
    with pytest.raises(ConfigError, match=f"port {port} .edge. is taken by"):
        listeners.choose_edge_port(settings_of(tmp_path), in_use=False)
    assert listeners.choose_edge_port(settings_of(tmp_path), in_use=True) == port
    assert listeners.choose_edge_port(settings_of(tmp_path, port=port), in_use=True) == port
