"""Herds at the edge: a thousand requests held for one microVM, and many microVMs held for at once."""

from __future__ import annotations

import asyncio
import ssl
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from service import PATIENCE, Instance
from test_sleep import events

pytestmark = [pytest.mark.vm, pytest.mark.long]
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}


def asleep(instance: Instance, *vms: dict[str, Any]) -> None:
    for vm in vms:
        instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
    for vm in vms:
        instance.state(vm["microvmId"], "SUSPENDED")


async def ask(instance: Instance, wanted: list[tuple[dict[str, Any], str]], connections: int) -> list[httpx.Response]:
    """All at once, over this many connections of HTTP/2."""
    context = ssl.create_default_context(cafile=str(instance.root / "tls/ca.crt"))
    clients = [
        httpx.AsyncClient(verify=context, http2=True, timeout=60 * PATIENCE, limits=httpx.Limits(max_connections=1))
        for _ in range(connections)
    ]
    try:
        return await asyncio.gather(
            *(
                clients[number % connections].get(f"https://{vm['endpoint']}{path}", headers={"X-aws-proxy-auth": vm["token"]})
                for number, (vm, path) in enumerate(wanted)
            )
        )
    finally:
        for client in clients:
            await client.aclose()


async def test_thousand_requests_are_held_for_one_microvm(instance: Instance, vm: dict[str, Any]) -> None:
    asleep(instance, vm)
    answers = await ask(instance, [(vm, "/")] * 1000, 10)
    assert [answer.status_code for answer in answers] == [200] * 1000
    assert sorted(answer.json()["counter"] for answer in answers) == list(range(1, 1001))
    assert [event for event, _, _ in events(instance, vm["microvmId"])].count("resumed") == 1


async def test_two_dozen_microvms_are_woken_at_once(instance: Instance, app: str) -> None:
    vms = [instance.launch(app, idlePolicy=POLICY) for _ in range(24)]
    for vm in vms:
        vm["token"] = instance.token(vm["microvmId"])
    try:
        asleep(instance, *vms)
        answers = await ask(instance, [(vm, "/") for vm in vms], 24)
        assert [(answer.status_code, answer.json()["counter"]) for answer in answers] == [(200, 1)] * 24
    finally:
        instance.terminate(*(vm["microvmId"] for vm in vms))


async def test_ten_microvms_are_launched_at_once(instance: Instance, app: str) -> None:
    """And asked at once, as each is: by HTTP/2."""
    with ThreadPoolExecutor(10) as pool:
        vms = list(pool.map(lambda _: dict(instance.client().run_microvm(imageIdentifier=app)), range(10)))
    try:
        for vm in vms:
            instance.state(vm["microvmId"], "RUNNING")
            vm["token"] = instance.token(vm["microvmId"])
        answers = await ask(instance, [(vm, "/") for vm in vms], 10)
        assert [(answer.status_code, answer.http_version, answer.json()["counter"]) for answer in answers] == [(200, "HTTP/2", 1)] * 10
        assert len({answer.json()["random"] for answer in answers}) == 10
    finally:
        instance.terminate(*(vm["microvmId"] for vm in vms))
