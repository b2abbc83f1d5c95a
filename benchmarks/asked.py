"""Asks a session over and over, in a process of its own: `python benchmarks/asked.py ENDPOINT CA TOKEN SECONDS`.

One connection, a request each 10 ms, open loop: one that is late counts from when it was due. Prints the milliseconds of each, and how many
had no answer, as JSON. Imports little, so that the first request comes soon after its start.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import time

EVERY, PATIENCE = 0.01, 10.0
LATE = 1.25  # it ends after so many times its seconds at the latest; what is due by then and was not asked counts as that late
_WARMING_UP = 5


class Session:
    def __init__(self, endpoint: str, ca: str, token: str) -> None:
        self._endpoint, self._context = endpoint, ssl.create_default_context(cafile=ca)
        self._request = f"GET / HTTP/1.1\r\nHost: {endpoint}\r\nX-aws-proxy-auth: {token}\r\n\r\n".encode()
        self._sock: ssl.SSLSocket | None = None

    def ask(self) -> bool:
        """Whether it answered as it should; if not, the next request has a new connection."""
        try:
            if self._sock is None:
                host, _, port = self._endpoint.partition(":")
                raw = socket.create_connection(("127.0.0.1", int(port)), PATIENCE)
                self._sock = self._context.wrap_socket(raw, server_hostname=host)
            self._sock.sendall(self._request)
            answer = b""
            while not answer.endswith(b"\r\n\r\nok"):
                piece = self._sock.recv(4096)
                if not piece or not (answer + piece).startswith(b"HTTP/1.1 200"):
                    raise ConnectionError
                answer += piece
            return True
        except OSError:
            self.close()
            return False

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
        self._sock = None


def asked(session: Session, seconds: float) -> tuple[list[float], int]:
    seen: list[float] = []
    failed, started = 0, time.perf_counter()
    for number in range(int(seconds / EVERY)):
        due = started + number * EVERY
        if time.perf_counter() < started + LATE * seconds:
            time.sleep(max(0.0, due - time.perf_counter()))
            failed += not session.ask()
        seen.append((time.perf_counter() - due) * 1e3)
    return seen, failed


def main(endpoint: str, ca: str, token: str, seconds: float) -> None:
    session = Session(endpoint, ca, token)
    for _ in range(_WARMING_UP):
        session.ask()
    milliseconds, failed = asked(session, seconds)
    session.close()
    print(json.dumps({"ms": milliseconds, "failed": failed}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))
