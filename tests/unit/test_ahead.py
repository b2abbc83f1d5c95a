"""MicroVMs that run ahead: whose images, how many, what they are asked, and that each becomes one session or nothing."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from test_lifecycle import Rig
from waiting import until

from gateway import messages as m
from gateway import reach
from gateway.rpc import RpcError, RpcLost
from gateway.sessions import ahead
from gateway.sessions.model import Image, Version
from gateway.sessions.states import State

ARN = "arn:aws:lambda:us-east-1:123456789012:microvm-image:a"
VALIDATES = {"hooks": {"port": 9000, "microvmImageHooks": {"validate": "ENABLED"}}}


class Application:
    """Answers on a socket of this host what a guest's application would, and remembers the requests."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.status = 200
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self.server.accept()
            except OSError:
                return
            with sock:
                self.asked.append(sock.recv(4096))
                sock.sendall(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % self.status)

    def close(self) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    one = Rig(tmp_path)
    await one.start()
    one.application = application = Application()  # type: ignore[attr-defined]
    monkeypatch.setattr(reach, "GUEST_ADDRESS", "127.0.0.1")
    monkeypatch.setattr(ahead, "_QUIET_SECONDS", 0.01)

    async def sock(session: str, incarnation: int) -> socket.socket:
        made = socket.socket()
        made.setblocking(False)
        return made

    one.host.socket = sock  # type: ignore[attr-defined]
    yield one
    await one.lifecycle.ahead.close()
    await one.stop()
    application.close()


def image(rig: Rig, **request: Any) -> None:
    version = Version(ARN, "1.0", request, 0, 0, "SUCCESSFUL", key="image")
    rig.store.images[ARN] = Image("i", ARN, "a", 0, 0, versions=[version])
    if "hooks" in request:
        request["hooks"]["port"] = rig.application.port  # type: ignore[attr-defined]


def waiting(rig: Rig) -> list[str]:
    return [name for name, held in rig.host.held.items() if name.startswith("ahead-") and held.phase == "prepared"]


def count(rig: Rig, call: str) -> int:
    return sum(one.split()[0] == call for one in rig.host.calls)


async def test_an_image_with_a_validate_hook_runs_ahead_and_each_becomes_one_session(rig: Rig) -> None:
    image(rig, **VALIDATES)
    rig.lifecycle.ahead.want(ARN, "1.0")
    await until(lambda: len(waiting(rig)) == 2)
    assert [asked.split(b"\r\n")[0] for asked in rig.application.asked] == [b"POST /aws/lambda-microvms/runtime/v1/validate HTTP/1.1"] * 2  # type: ignore[attr-defined]
    before = set(waiting(rig))
    session = await rig.launched()
    assert session.state is State.RUNNING and rig.host.held[session.id].phase == "running"
    assert count(rig, "claim") == 1 and session.id not in rig.host.prepared
    assert len(before & set(waiting(rig))) == 1  # the other one is not touched
    await until(lambda: len(waiting(rig)) == 2)


async def test_settings_name_an_image_and_what_to_ask(rig: Rig) -> None:
    port = rig.application.port  # type: ignore[attr-defined]
    rig.settings.images.run_ahead = {"a": f":{port}/health?x=1"}
    image(rig)
    rig.lifecycle.ahead.want(ARN, "1.0")
    await until(lambda: len(waiting(rig)) == 2)
    assert rig.application.asked[0].startswith(b"GET /health?x=1 HTTP/1.1\r\nHost: localhost:")  # type: ignore[attr-defined]


@pytest.mark.parametrize("target", ["", "health", ":99999999/x", "/a b", "/a\r\nHost: x"])
async def test_nobody_else_runs_ahead(rig: Rig, target: str) -> None:
    rig.settings.images.run_ahead = {"a": target, "b": "/"}
    image(rig)
    assert rig.lifecycle.ahead.want(ARN, "1.0") is None
    session = await rig.launched()
    assert session.state is State.RUNNING and count(rig, "claim") == 0
    assert rig.host.prepared == [session.id]


async def test_one_that_refuses_is_forgotten_and_launches_go_on(rig: Rig) -> None:
    rig.application.status = 500  # type: ignore[attr-defined]
    image(rig, **VALIDATES)
    rig.lifecycle.ahead.want(ARN, "1.0")
    await until(lambda: rig.application.asked)  # type: ignore[attr-defined]
    await until(lambda: not [name for name in rig.host.held if name.startswith("ahead-")])
    session = await rig.launched()
    assert session.state is State.RUNNING and count(rig, "claim") == 0 and not waiting(rig)


async def test_one_that_died_is_passed_over(rig: Rig) -> None:
    image(rig, **VALIDATES)
    rig.lifecycle.ahead.want(ARN, "1.0")
    await until(lambda: len(waiting(rig)) == 2)
    rig.host.fail["claim"] = [RpcError("Ended", "gone")]
    session = await rig.launched()
    assert count(rig, "claim") == 2 and session.state is State.RUNNING


async def test_a_claim_whose_answer_was_lost_takes_no_other_one(rig: Rig) -> None:
    """The host may have done it: it is asked to prepare the session, which it then has, and the second one goes on waiting."""
    image(rig, **VALIDATES)
    rig.lifecycle.ahead.want(ARN, "1.0")
    await until(lambda: len(waiting(rig)) == 2)
    rig.host.fail["claim"] = [RpcLost("away")]
    session = await rig.launched()
    assert session.state is State.RUNNING and count(rig, "claim") == 1 and count(rig, "prepare") >= 3
    assert waiting(rig)


async def test_a_full_host_keeps_none(rig: Rig) -> None:
    rig.host.memory_available = 1 << 30
    image(rig, **VALIDATES)
    pool = rig.lifecycle.ahead.want(ARN, "1.0")
    assert pool is not None and pool.filling is not None
    await asyncio.wait([pool.filling])
    assert not waiting(rig)


async def test_none_is_left_of_an_image_that_goes(rig: Rig) -> None:
    image(rig, **VALIDATES)
    rig.lifecycle.ahead.want(ARN, "1.0")
    await until(lambda: waiting(rig))  # and one is being made
    await rig.lifecycle.ahead.drop("image")
    assert not [name for name in rig.host.held if name.startswith("ahead-")]
    rig.host.held["other"] = m.SessionState("other", 1, "running", 0, 0.0)
    await rig.lifecycle.ahead.close()
    assert list(rig.host.held) == ["other"]
