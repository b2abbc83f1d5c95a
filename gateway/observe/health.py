"""/healthz and /readyz, beside /metrics: whether every process serves, and whether new work would be taken.

The supervisor writes down what its processes do, and control, whose answer this is, adds what it sees itself: vmm and the disk. A control
that does not serve gives no answer in time, which whoever asks has to take for a no.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

from aiohttp import web

from gateway.rpc import RpcError

_VMM_SECONDS = 2.0

Check = tuple[bool, str]


async def of_host(ask: Callable[[], Awaitable[object]]) -> Check:
    try:
        async with asyncio.timeout(_VMM_SECONDS):
            await ask()
    except TimeoutError:
        return False, f"no answer in {_VMM_SECONDS:g} s"
    except RpcError as error:
        return False, str(error)
    return True, "answers"


def of_disk(free: Callable[[], int], reserve_mib: int) -> Check:
    """Below the reserve nothing is launched; what runs goes on."""
    try:
        left = free() >> 20
    except OSError as error:
        return False, str(error)
    return left >= reserve_mib, f"{left} MiB free, {reserve_mib} MiB kept back"


def application(
    made: web.Application, processes: Callable[[], dict[str, Check]], work: Callable[[], Awaitable[dict[str, Check]]],
    may_read: Callable[[web.Request], bool] = lambda request: True,
) -> None:  # fmt: skip
    """Adds both to an application. `processes` are what /healthz is about; /readyz is about these and what `work` says. Who may not read
    metrics is told yes or no alone."""

    def answer(request: web.Request, checks: dict[str, Check]) -> web.Response:
        body: dict[str, object] = {"ok": all(ok for ok, _ in checks.values())}
        if may_read(request):
            body["checks"] = {name: {"ok": ok, "text": text} for name, (ok, text) in checks.items()}
        return web.Response(
            status=200 if body["ok"] else 503, body=json.dumps(body).encode() + b"\n", content_type="application/json",
            headers={"cache-control": "no-store"},
        )  # fmt: skip

    async def health(request: web.Request) -> web.Response:
        return answer(request, processes())

    async def readiness(request: web.Request) -> web.Response:
        return answer(request, processes() | await work())

    made.router.add_get("/healthz", health)
    made.router.add_get("/readyz", readiness)
