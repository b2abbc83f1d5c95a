"""Prometheus metrics of control, with bounded labels."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gateway.sessions.states import State

registry = CollectorRegistry()
sessions = Gauge("torpor_sessions", "Sessions by state.", ["state"], registry=registry)
transitions = Counter("torpor_transitions", "State changes by event.", ["event"], registry=registry)
seconds = Histogram(
    "torpor_action_seconds", "What launches, suspends and resumes take.", ["action"], registry=registry,
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)  # fmt: skip


def application(states: object) -> web.Application:
    """`states` is called for the sessions' current states."""

    async def serve(request: web.Request) -> web.Response:
        counts = dict.fromkeys(State, 0)
        for state in states():  # type: ignore[operator]
            counts[state] += 1
        for state, count in counts.items():
            sessions.labels(state.value).set(count)
        return web.Response(body=generate_latest(registry), content_type="text/plain", charset="utf-8")

    made = web.Application()
    made.router.add_get("/metrics", serve)
    return made
