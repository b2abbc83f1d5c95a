"""A thousand sleeping sessions, a request for each at once, held; over a host without machines, so that it is the edge and control
alone that are measured: what a held session costs, and how long control takes to wake all of them."""

from __future__ import annotations

import resource
import threading
import time

import pytest
from hollow import hollow
from service import until

pytestmark = [pytest.mark.service, pytest.mark.long]
SESSIONS = 1000


def test_a_thousand_sessions_are_held_and_each_is_answered(host_before: dict[str, set[str]]) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(16_384, most[1]), most[1]))
    with hollow(SESSIONS) as one:
        before = {name: one.memory_kib(name) for name in one.processes}
        began = time.monotonic()
        clients = [one.client(number) for number in range(SESSIONS)]
        assert time.monotonic() - began < 25, "held is for 30 s"
        held = {name: one.memory_kib(name) - before[name] for name in one.processes}
        answers: list[bytes] = []

        def read(share: int) -> None:
            for client in clients[share::8]:
                answers.append(client.recv(4096))
                client.close()

        readers = [threading.Thread(target=read, args=(share,)) for share in range(8)]
        for reader in readers:
            reader.start()
        assert not answers
        released = time.monotonic()
        one.release()
        for reader in readers:
            reader.join()
        took = time.monotonic() - released
        assert sum(answer.startswith(b"HTTP/1.1 200 ") for answer in answers) == SESSIONS
        until(lambda: one.host.prepared == SESSIONS)  # one resume for each, and no more
        edges = sum(size for name, size in held.items() if name.startswith("edge"))
        print(f"\nheld: {edges} KiB at the edges, {held['control']} KiB at control; all awake after {took:.1f} s")
        assert edges < SESSIONS * 150 and held["control"] < SESSIONS * 60
