"""The steps of a session's and an image's life, each with what comes before it; and what must hold after it, whatever fault it met."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from harness import HostUnderTest, Hung, host
from seam import Plan, Seam, faults_of
from timewarp import TimeWarp

from gateway.sessions.model import Image
from gateway.sessions.states import Event, State

_TRIES = 8  # to wake a session, or to do something about an image, after a fault: whoever was told to try again does
_NAME = "new"  # of the image that is built here
_ARN = f"arn:aws:lambda:us-east-1:123456789012:microvm-image:{_NAME}"
Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Step:
    arrange: Callable[[Case], Awaitable[None]]
    act: Callable[[Case], Awaitable[None]]
    settings: dict[str, Any] = field(default_factory=dict)
    ends: tuple[str, ...] = ()  # sessions that the step may end: launched in it, or terminated by it
    again: Callable[[Image | None], Call | None] = lambda image: None  # what is to be asked for until the image is as was wanted


class Case:
    """A host in the middle of its life, and what its sessions have counted."""

    def __init__(self, one: HostUnderTest) -> None:
        self.host = one
        self.ledger: dict[str, int] = {}

    async def launch(self, name: str, count: int = 3, of: str = "") -> None:
        """Of the version `of` of the image that is built here, or of the one that is there."""
        image = self.host.image(_ARN)
        version = image.find(of) if image is not None else None
        self.host.launch(name, *((_ARN, of, version.key) if version is not None else ()))
        await self.host.reach(name, State.RUNNING)
        self.ledger[name] = 0
        self.count(name, count)

    def count(self, name: str, times: int = 1) -> None:
        for _ in range(times):
            self.ledger[name] = self.host.guest(name).count()

    async def suspend(self, name: str) -> None:
        self.host.fire(name, Event.SUSPEND)
        await self.host.reach(name, State.SUSPENDED)

    async def wake(self, name: str) -> None:
        self.host.request(name)
        await self.host.reach(name, State.RUNNING)

    async def call(self, operation: str, arguments: dict[str, Any]) -> None:
        self.host.call(operation, **arguments)
        await asyncio.sleep(0.01)
        await self.host.settled([])


async def _running(case: Case) -> None:
    await case.launch("a")


async def _asleep(case: Case) -> None:
    await case.launch("a")
    await case.suspend("a")


async def _long_chain(case: Case) -> None:
    """One more suspend, and the chain is folded."""
    await case.launch("a")
    for _ in range(5):
        await case.suspend("a")
        await case.wake("a")
        case.count("a")


async def _warm_and_running(case: Case) -> None:
    await case.launch("a")
    await case.suspend("a")
    await case.launch("b", 2)


async def _in_all_states(case: Case) -> None:
    for name in ("a", "b", "c"):
        await case.launch(name)
    await case.suspend("a")
    await case.suspend("b")  # a cools


async def _nothing(case: Case) -> None:
    pass


async def _launch(case: Case) -> None:
    case.host.launch("n")


async def _suspend(case: Case) -> None:
    case.host.fire("a", Event.SUSPEND)


async def _suspend_b(case: Case) -> None:
    case.host.fire("b", Event.SUSPEND)


async def _resume(case: Case) -> None:
    case.host.request("a")


async def _suspend_and_resume(case: Case) -> None:
    case.host.fire("a", Event.SUSPEND)
    await asyncio.sleep(0.01)
    case.host.request("a")


async def _terminate(case: Case) -> None:
    case.host.fire("a", Event.TERMINATE, "Success.")


async def _vmm_again(case: Case) -> None:
    case.host.seam.kill("vmm")


async def _control_again(case: Case) -> None:
    case.host.seam.kill("control")


async def _time_passes(case: Case) -> None:
    await asyncio.sleep(22)


async def _archived(case: Case) -> None:
    await _asleep(case)
    await asyncio.sleep(15)
    session = case.host.session("a")
    assert session is not None and session.archived is not None, "it was not archived"


# ---- images ----

_CREATE: Call = "create_microvm_image", {"name": _NAME}
_UPDATE: Call = "update_microvm_image", {"imageIdentifier": _ARN}
_DELETE: Call = "delete_microvm_image", {"imageIdentifier": _ARN}


def _delete_version(number: str) -> Call:
    return "delete_microvm_image_version", {"imageIdentifier": _ARN, "imageVersion": number}


async def _one_version(case: Case) -> None:
    """And one that sleeps: of this version."""
    await case.call(*_CREATE)
    await case.launch("v", of="1.0")
    await case.suspend("v")


async def _two_versions(case: Case) -> None:
    """And one that sleeps: of the newer."""
    await case.call(*_CREATE)
    await case.call(*_UPDATE)
    await case.launch("v", of="2.0")
    await case.suspend("v")


async def _unused(case: Case) -> None:
    await _asleep(case)
    await case.call(*_CREATE)


def _does(*calls: Call, pause: float = 0.0) -> Callable[[Case], Awaitable[None]]:
    async def act(case: Case) -> None:
        for operation, arguments in calls:
            case.host.call(operation, **arguments)
            await asyncio.sleep(pause)

    return act


def _until_built(image: Image | None) -> Call | None:
    if image is None:
        return _CREATE
    if image.state in ("CREATE_FAILED", "DELETE_FAILED"):
        return _DELETE
    return _UPDATE if image.versions[-1].state != "SUCCESSFUL" else None


def _until_without(number: str) -> Callable[[Image | None], Call | None]:
    return lambda image: _delete_version(number) if image is not None and image.find(number) is not None else None


_ARCHIVE: dict[str, Any] = {
    "archive": {"after_seconds": 10.0}, "object_store": {"embedded": False, "endpoint": "http://store", "access_key": "k", "secret_key": "s"}
}  # fmt: skip

STEPS = {
    "launch": Step(_nothing, _launch, ends=("n",)),
    "suspend": Step(_running, _suspend),
    "suspend, kept warm": Step(_running, _suspend, {"warm": 1}),
    "resume": Step(_asleep, _resume),
    "resume, warm": Step(_asleep, _resume, {"warm": 1}),
    "cool": Step(_warm_and_running, _suspend_b, {"warm": 1}),
    "cool by time": Step(_asleep, _time_passes, {"warm": 1, "warm_seconds": 8.0}),
    "fold": Step(_long_chain, _suspend),
    "resume beside a fold": Step(_long_chain, _suspend_and_resume),
    "archive": Step(_asleep, _time_passes, _ARCHIVE),
    "fetch": Step(_archived, _resume, _ARCHIVE),
    "terminate archived": Step(_archived, _terminate, _ARCHIVE, ends=("a",)),
    "terminate": Step(_running, _terminate, ends=("a",)),
    "terminate asleep": Step(_asleep, _terminate, ends=("a",)),
    "terminate warm": Step(_asleep, _terminate, {"warm": 1}, ends=("a",)),
    "build": Step(_asleep, _does(_CREATE), again=_until_built),
    "update of an image": Step(_one_version, _does(_UPDATE), again=_until_built),
    "deletion of an image": Step(_unused, _does(_DELETE), again=lambda image: _DELETE if image is not None else None),
    "deletion of a version": Step(_two_versions, _does(_delete_version("1.0")), again=_until_without("1.0")),
    "deletion of a version in build": Step(_one_version, _does(_UPDATE, _delete_version("2.0"), pause=0.1), again=_until_without("2.0")),
    "recovery of vmm": Step(_in_all_states, _vmm_again, {"warm": 1}),
    "recovery of control": Step(_in_all_states, _control_again, {"warm": 1}),
}


@dataclass
class Outcome:
    struck: str = ""  # the call that failed
    losses: list[str] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)


def run(directory: Any, step: Step, plan: Plan | None) -> Outcome:
    """Takes a step with one fault in it, and says what was lost by it: nothing."""
    loop = TimeWarp()
    asyncio.set_event_loop(loop)
    loop.set_exception_handler(lambda *_: None)  # what the killed leave
    try:
        return loop.run_until_complete(_run(directory, step, plan))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _run(directory: Any, step: Step, plan: Plan | None) -> Outcome:
    seam, outcome = Seam(plan), Outcome()
    async with host(directory, seam, **step.settings) as one:
        case = Case(one)
        await step.arrange(case)
        await asyncio.sleep(1)
        names = sorted({*case.ledger, *step.ends})
        seam.is_armed = True
        await step.act(case)
        await asyncio.sleep(0.01)
        try:
            await one.settled(names)
            await asyncio.sleep(2)
            await one.settled(names)
            seam.is_armed = False
            outcome.struck, outcome.names = seam.has_struck, dict(seam.names)
            if plan is None or seam.has_struck:
                await _look(case, step, outcome)
        except Hung as error:
            outcome.losses.append(f"hangs: {error}")
        except AssertionError as error:
            outcome.losses.append(f"{error!r}")
        outcome.losses += one.world.wrong
    return outcome


async def _look(case: Case, step: Step, outcome: Outcome) -> None:
    """With the fault gone, each session goes on where it was, its ledger intact; then it ends, and nothing is left."""
    one, lost = case.host, outcome.losses
    for name, count in case.ledger.items():
        session = one.session(name)
        if name in (*step.ends, *one.world.unsaved) and (session is None or session.state is State.TERMINATED):
            continue
        if session is None or session.state.is_ended:
            lost.append(f"{name} is gone: {None if session is None else session.reason}")
            continue
        for _ in range(_TRIES):
            session = one.session(name)
            if session is not None and session.state is State.SUSPENDED:
                one.request(name)
            await asyncio.sleep(1)
            await one.settled([name])
            session = one.session(name)
            if session is None or session.state is not State.SUSPENDED:
                break
        if session is None or session.state is not State.RUNNING:
            lost.append(f"{name} does not wake: {None if session is None else (session.state.value, session.reason)}")
            continue
        found = one.guest(name).counter
        if found != count:
            lost.append(f"{name} has counted {found}, not {count}")
        case.count(name)
        await case.suspend(name)
        await case.wake(name)
        if (found := one.guest(name).counter) != count + 1:
            lost.append(f"{name} has counted {found} after one more sleep, not {count + 1}")
    await _look_at_image(case, step, lost)
    await _end_all(case, step)
    _nothing_left(one, lost)


async def _look_at_image(case: Case, step: Step, lost: list[str]) -> None:
    """Asked again, it becomes what was wanted; and what is there of it can be launched."""
    one = case.host
    image = await _asked(case, step.again)
    if image is not None:
        number = image.versions[-1].version
        await case.launch("i", of=number)
        await case.suspend("i")
        await case.wake("i")
        if (found := one.guest("i").counter) != case.ledger["i"]:
            lost.append(f"a session of version {number} has counted {found}")


async def _asked(case: Case, again: Callable[[Image | None], Call | None]) -> Image | None:
    """Asks until there is nothing to be asked for; returns the image, where there is one."""
    for _ in range(_TRIES):
        call = again(case.host.image(_ARN))
        if call is None:
            return case.host.image(_ARN)
        await case.call(*call)
    raise AssertionError(f"the image does not become what was asked for: {case.host.image(_ARN)}")


async def _end_all(case: Case, step: Step) -> None:
    one = case.host
    names = sorted({*case.ledger, *step.ends})
    for name in names:
        for _ in range(_TRIES):
            session = one.session(name)
            if session is None or session.state is State.TERMINATED:
                break
            one.fire(name, Event.TERMINATE, "Success.")
            await asyncio.sleep(1)
            await one.settled([name])
    await _asked(case, lambda image: _DELETE if image is not None else None)
    one.as_control(lambda control: control.registry.sweep())
    await asyncio.sleep(30)  # housekeeping


def _nothing_left(one: HostUnderTest, lost: list[str]) -> None:
    for folder, names in one.files().items():
        aside = one.world.unsaved if folder.endswith("quarantine") else ()  # with what there is of them
        if left := [name for name in names if name not in aside and not (name.startswith(".") and folder.endswith("sessions"))]:
            lost.append(f"left in {folder}/: {left}")
    assert one.vmm is not None
    waiting = sum(one.vmm.standbys.statistics().values())
    if len(one.world.alive()) != waiting:
        lost.append(f"{len(one.world.alive())} hypervisors run, and {waiting} wait for sessions")
    if one.world.objects:
        lost.append(f"archives are left: {sorted(one.world.objects)}")
    if one.world.links:
        lost.append(f"links are left: {sorted(one.world.links)}")


def plans(names: dict[str, list[str]]) -> list[Plan]:
    """Every fault of every call."""
    return [
        Plan(owner, nth, fault) for owner, calls in names.items() if owner for nth, name in enumerate(calls) for fault in faults_of(name)
    ]
