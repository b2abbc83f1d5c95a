"""A link of 100 ms there and back, between two network namespaces: one stream of HTTP/2 fills it, because its window grows with use."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import h2.config
import h2.connection
import h2.events
import pytest
from hollow import Hollow, hollow
from namespaces import Namespace, namespace
from outside import bound
from relay import Relay

pytestmark = pytest.mark.service
UPLOAD = 48 << 20
FIRST, MOST = 64 << 10, 8 << 20  # a stream's window at first, and at most (gateway/edge/wire/http2_flow.py)


@pytest.fixture
def far(host_before: dict[str, set[str]]) -> Iterator[Namespace]:
    with namespace() as one:
        yield one


class Upload:
    """One request with a long body, sent as fast as the windows let it."""

    def __init__(self, one: Hollow, sock: socket.socket) -> None:
        context = ssl.create_default_context(cafile=str(one.settings.tls_dir / "ca.crt"))
        context.set_alpn_protocols(["h2"])
        sock.settimeout(60)
        self.sock = context.wrap_socket(sock, server_hostname=one.endpoints[0].partition(":")[0])
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="latin-1"))
        self.h2.initiate_connection()
        self.sent = self.credited = 0
        self.ended = False

    def run(self, fields: list[tuple[str, str]]) -> None:
        self.h2.send_headers(1, fields)
        while not self.ended:
            self._send()
            for event in self.received():
                if isinstance(event, h2.events.WindowUpdated) and event.stream_id == 1:
                    self.credited += event.delta
                self.ended = self.ended or isinstance(event, h2.events.StreamEnded)
                assert not isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated)

    def received(self) -> list[h2.events.Event]:
        """What comes next, which is not the connection's end."""
        data = self.sock.recv(1 << 16)
        assert data, "the connection ended"
        return self.h2.receive_data(data)

    def _send(self) -> None:
        while self.sent < UPLOAD and (room := min(self.h2.local_flow_control_window(1), self.h2.max_outbound_frame_size)):
            piece = bytes(min(room, UPLOAD - self.sent))
            self.sent += len(piece)
            self.h2.send_data(1, piece, end_stream=self.sent == UPLOAD)
        self.sock.sendall(self.h2.data_to_send())


def test_one_stream_fills_a_long_link(far: Namespace) -> None:
    with hollow(1, workers=1) as one:
        one.release()
        listener = far.inside(lambda: bound(socket.SOCK_STREAM, ("127.0.0.1", 0)))
        with Relay(listener, ("127.0.0.1", one.settings.edge.port), 0.05):
            address = listener.getsockname()
            upload = Upload(one, far.inside(lambda: socket.create_connection(address)))
            authority = one.endpoints[0]
            fields = [(":method", "PUT"), (":scheme", "https"), (":authority", authority), (":path", "/"), ("content-length", str(UPLOAD))]
            upload.run([*fields, ("x-aws-proxy-auth", one.token(0))])
            upload.sock.close()
    # What is left of its credit at the end is its window's size, less what was not yet credited again (up to half). With windows as
    # they are at first this would take 75 s: 64 KiB for each tenth of a second.
    assert MOST // 4 < FIRST + upload.credited - upload.sent <= MOST


def test_a_stream_that_is_slow_gets_no_larger_window(far: Namespace) -> None:
    """Windows grow only where they are used up: one that waits for its client is worth no memory."""
    with hollow(1, workers=1) as one:
        one.release()
        upload = Upload(one, socket.create_connection(("127.0.0.1", one.settings.edge.port)))
        fields = [(":method", "PUT"), (":scheme", "https"), (":authority", one.endpoints[0]), (":path", "/"), ("content-length", "3")]
        upload.h2.send_headers(1, [*fields, ("x-aws-proxy-auth", one.token(0))])
        upload.h2.send_data(1, b"a")
        upload.sock.sendall(upload.h2.data_to_send())
        assert upload.h2.local_flow_control_window(1) <= FIRST
        upload.h2.send_data(1, b"bc", end_stream=True)
        upload.sock.sendall(upload.h2.data_to_send())
        while not any(isinstance(event, h2.events.StreamEnded) for event in upload.received()):
            pass
        upload.sock.close()
