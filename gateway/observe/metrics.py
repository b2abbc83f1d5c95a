"""Prometheus metrics of control, with bounded labels."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Iterable

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gateway.messages import Counters, Tier
from gateway.rpc import RpcError
from gateway.sessions.states import Event, State

registry = CollectorRegistry()
sessions = Gauge("torpor_sessions", "Sessions by state.", ["state"], registry=registry)
transitions = Counter("torpor_transitions", "State changes by event.", ["event"], registry=registry)
seconds = Histogram(
    "torpor_action_seconds", "What launches, suspends and resumes take.", ["action"], registry=registry,
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)  # fmt: skip
edge_answers = Counter("torpor_edge_answers", "Requests answered at endpoints.", ["protocol", "status"], registry=registry)
edge_now = Gauge(
    "torpor_edge", "At the edge's workers now: clients, held requests, connections to applications.", ["what"], registry=registry
)
asleep = Gauge("torpor_asleep", "Sleeping sessions: warm (paused), cold (files), archived (object store).", ["tier"], registry=registry)
asleep_bytes = Gauge("torpor_asleep_bytes", "What sleeping sessions take there.", ["tier"], registry=registry)
ran_ahead = Gauge("torpor_ran_ahead", "MicroVMs that ran ahead and wait for launches.", registry=registry)
out_of_memory = Counter(
    "torpor_out_of_memory", "Processes that the kernels of running microVMs killed for want of memory.", registry=registry
)
hypervisors = Counter("torpor_hypervisors", "What Firecracker counted, of all microVMs together.", ["what"], registry=registry)
_hypervisors: dict[str, int] = {}  # as vmm last said; one that was started anew begins with nothing
_counted: dict[Hashable, Counters] = {}  # by worker, as last reported: a worker's own counts only grow


def transition(event: Event) -> None:
    transitions.labels(event.value).inc()


def action_took(action: str, taken: float) -> None:
    seconds.labels(action).observe(taken)


def edge_counted(worker: Hashable, counters: Counters) -> None:
    """Labels are bounded: protocol, and the status's first digit."""
    before = _counted.get(worker)
    for protocol, answers in counters.answers.items():
        known = before.answers[protocol] if before is not None else [0] * len(answers)
        for digit, (now, then) in enumerate(zip(answers, known, strict=True)):
            if now > then:
                edge_answers.labels(protocol, f"{digit}xx").inc(now - then)
    _counted[worker] = counters


def edge_left(worker: Hashable) -> None:
    _counted.pop(worker, None)


def _edge_sums() -> dict[str, int]:
    sums = {
        "clients": sum(counters.clients for counters in _counted.values()),
        "held": sum(counters.held for counters in _counted.values()),
    }
    sums["parked"] = sum(counters.parked for counters in _counted.values())
    sums["access_log_lines_lost"] = sum(counters.lost_lines for counters in _counted.values())
    sums["access_log_not_reopened"] = sum(counters.not_reopened for counters in _counted.values())
    for counters in _counted.values():
        for name, count in counters.origins.items():
            sums[f"origins_{name}"] = sums.get(f"origins_{name}", 0) + count
    return sums


def hypervisors_counted(now: dict[str, int]) -> None:
    """`now`: sums of one vmm, by names of vmm's, which are few."""
    is_new = any(now.get(what, 0) < count for what, count in _hypervisors.items())
    for what, count in now.items():
        hypervisors.labels(what).inc(count if is_new else count - _hypervisors.get(what, 0))
    _hypervisors.clear()
    _hypervisors.update(now)


def application(
    states: Callable[[], Iterable[State]], tiers: Callable[[], Awaitable[dict[str, Tier]]],
    counted: Callable[[], Awaitable[dict[str, int]]], may_read: Callable[[web.Request], bool] = lambda request: True,
) -> web.Application:  # fmt: skip
    """`states` is called for the sessions' current states, `tiers` for where those that sleep are, `counted` for what hypervisors count."""

    async def serve(request: web.Request) -> web.Response:
        if not may_read(request):
            return web.Response(status=401, text="a bearer token is needed\n", headers={"WWW-Authenticate": "Bearer"})
        counts = dict.fromkeys(State, 0)
        for state in states():
            counts[state] += 1
        for state, count in counts.items():
            sessions.labels(state.value).set(count)
        try:
            sleeping = (await tiers()).values()
            hypervisors_counted(await counted())
        except RpcError:  # the host is away: the figures stay as they were
            sleeping = None
        for tier in ("warm", "cold", "archived") if sleeping is not None else ():
            among = [session.stored_bytes for session in sleeping or () if session.tier == tier]
            asleep.labels(tier).set(len(among))
            asleep_bytes.labels(tier).set(sum(among))
        for what, count in _edge_sums().items():
            edge_now.labels(what).set(count)
        return web.Response(body=generate_latest(registry), content_type="text/plain", charset="utf-8")

    made = web.Application()
    made.router.add_get("/metrics", serve)
    return made
