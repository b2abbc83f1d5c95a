"""/healthz and /readyz: what the processes do, whether new work would be taken; and what systemd is told."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from gateway import notify, status
from gateway.config import Settings
from gateway.observe import health
from gateway.rpc import RpcLost
from gateway.status import ChildState, State
from gateway.supervisor import _feed_watchdog, environment_for, settings_for


def write(path: Path, *children: ChildState) -> None:
    path.write_bytes(msgspec.json.encode(State(children=list(children))))


async def asked(path: Path, *, vmm_answers: bool = True, free_mib: int = 5000) -> dict[str, tuple[int, object]]:
    """The answers of both paths: their status, and the texts of what is not well."""

    async def host() -> None:
        if not vmm_answers:
            raise RpcLost("vmm.sock is not there")

    async def work() -> dict[str, health.Check]:
        return {"vmm answers": await health.of_host(host), "disk": health.of_disk(lambda: free_mib << 20, 1024)}

    application = web.Application()
    health.application(application, lambda: status.checks(path, 100.0), work)
    found: dict[str, tuple[int, object]] = {}
    async with TestClient(TestServer(application)) as client:
        for name in ("healthz", "readyz"):
            answer = await client.get(f"/{name}")
            body = await answer.json()
            assert body["ok"] == (answer.status == 200)
            found[name] = (answer.status, {key: check["text"] for key, check in body["checks"].items() if not check["ok"]})
    return found


async def test_all_is_well(tmp_path: Path) -> None:
    write(tmp_path / "state", ChildState("vmm", True, 40.0), ChildState("control", True, 40.0, 3))
    assert await asked(tmp_path / "state") == {"healthz": (200, {}), "readyz": (200, {})}
    assert status.checks(tmp_path / "state", 100.0)["control"] == (True, "serves for 60 s, started again 3 times")


async def test_a_child_that_cannot_be_started_is_said_with_its_reason(tmp_path: Path) -> None:
    write(tmp_path / "state", ChildState("vmm", True, 40.0), ChildState("edge-0", False, 90.0, 7, "edge-0 did not start: no memory"))
    words = {"edge-0": "does not serve for 10 s, started again 7 times: edge-0 did not start: no memory"}
    assert await asked(tmp_path / "state") == {"healthz": (503, words), "readyz": (503, words)}


async def test_a_host_that_takes_no_work_is_healthy_and_not_ready(tmp_path: Path) -> None:
    write(tmp_path / "state", ChildState("vmm", True, 40.0))
    assert await asked(tmp_path / "state", vmm_answers=False) == {
        "healthz": (200, {}), "readyz": (503, {"vmm answers": "vmm.sock is not there"})
    }  # fmt: skip
    assert await asked(tmp_path / "state", free_mib=3) == {
        "healthz": (200, {}), "readyz": (503, {"disk": "3 MiB free, 1024 MiB kept back"})
    }  # fmt: skip


async def test_no_state_file_is_no_health(tmp_path: Path) -> None:
    code, words = (await asked(tmp_path / "none"))["healthz"]
    assert code == 503 and "cannot be read" in str(words)


async def test_a_host_that_does_not_answer_is_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_VMM_SECONDS", 0.01)
    assert await health.of_host(asyncio.Event().wait) == (False, "no answer in 0.01 s")


# ---- systemd ----


@pytest.mark.parametrize("form", ["/", "@"])
async def test_systemd_is_told_and_its_watchdog_fed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name if form == "/" else "\0" + name)
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name if form == "/" else "@" + name)
        notify.tell("READY=1", "STATUS=serving")
        assert sock.recv(1000) == b"READY=1\nSTATUS=serving"
        notify.reloading()
        assert sock.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        monkeypatch.setenv("WATCHDOG_USEC", "30000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        task = asyncio.ensure_future(_feed_watchdog())
        assert [await asyncio.to_thread(sock.recv, 1000) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        task.cancel()


async def test_without_systemd_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    notify.tell("READY=1")
    await asyncio.wait_for(_feed_watchdog(), 5)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify.tell("READY=1")
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    monkeypatch.setenv("WATCHDOG_PID", "1")  # another process's: it was inherited
    assert notify.watchdog_seconds() is None


# ---- what children get ----


def test_credentials_and_proxies_reach_who_asks_other_services() -> None:
    ours = {
        "PATH": "/bin", "TORPOR_LOG": "warning", "AWS_ACCESS_KEY_ID": "key", "AWS_PROFILE": "mine", "HTTPS_PROXY": "http://proxy",
        "NO_PROXY": "internal", "SECRET": "one", "HOME": "/root",
    }  # fmt: skip
    common = {"PATH": "/bin", "TORPOR_LOG": "warning", "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
    assert environment_for("edge-0", ours) == environment_for("vmm", ours) == common
    assert environment_for("control", ours) == common | {
        "AWS_ACCESS_KEY_ID": "key", "HTTPS_PROXY": "http://proxy", "no_proxy": "internal,localhost,127.0.0.1,::1"
    }  # fmt: skip


def test_who_speaks_with_strangers_knows_no_secrets() -> None:
    settings = Settings.model_validate({"object_store": {"secret_key": "s3cret"}, "credentials": {"secret_key": "s3cret"}})
    assert "s3cret" in settings_for("control", settings).model_dump_json()
    assert "s3cret" not in settings_for("edge-0", settings).model_dump_json()
    assert "s3cret" not in settings_for("store", settings).model_dump_json() + settings_for("vmm", settings).model_dump_json()


def test_the_parts_of_a_stop_fit_into_its_time() -> None:
    for stop in (30.0, 120.0, 600.0):
        for drain in (0.0, 30.0, 900.0):
            settings = Settings.model_validate({"service": {"stop_seconds": stop}, "edge": {"drain_seconds": drain}})
            assert 0 < settings.suspend_seconds + min(drain, stop / 4) + 20 <= stop
