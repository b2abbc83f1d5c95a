"""A fixed sample of the matrix of faults on real microVMs: one system call of vmm's fails once, in a step of a session's life.

How many calls a step makes is counted first; the sample strikes at places spread over them. After each case both sessions wake with what
they have counted in memory and on disk, and what the step launched has come or gone as a whole.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from durable import DurableStore
from hand import POLICY, Hand, asked, ledger_image
from service import Instance, until

pytestmark = pytest.mark.vm
_KEY, _SECRET = "AKIAFAULTS", "secret-of-the-faults"
_TRIES = 4
_SETTLED_SECONDS = 6.0  # a sleeper is archived two seconds after it fell asleep
SAMPLE = (
    ("launch", "EMFILE", 0.1), ("launch", "ENOSPC", 0.5), ("launch", "EIO", 0.9), ("suspend", "ENOMEM", 0.1), ("suspend", "ENOSPC", 0.4),
    ("suspend", "EIO", 0.7), ("resume", "EMFILE", 0.2), ("resume", "ENOMEM", 0.5), ("resume", "EIO", 0.8), ("cool", "ENOSPC", 0.4),
    ("cool", "EIO", 0.8), ("fold", "ENOSPC", 0.2), ("fold", "EMFILE", 0.4), ("archive", "EMFILE", 0.2), ("archive", "EIO", 0.4),
)  # fmt: skip


class Case:
    """An instance, two sessions and what they have counted."""

    def __init__(self, one: Instance, hand: Hand, image: str) -> None:
        self.one, self.hand, self.image = one, hand, image
        self.vms = [self.launched() for _ in range(2)]
        self.counts = [0, 0]
        self.new: list[str] = []
        for number in range(2):
            self.use(number)

    def launched(self) -> dict[str, Any]:
        vm = self.one.launch(self.image, idlePolicy=POLICY)
        return vm | {"token": self.one.token(vm["microvmId"])}

    def use(self, number: int) -> None:
        """One request, answered by the application where it was."""

        def answered() -> tuple[int, int] | None:
            status, found = asked(self.one, self.vms[number])
            assert status in (200, 429, 502), status
            return found if status == 200 else None

        self.counts[number] += 1
        assert until(answered, 30) == (self.counts[number],) * 2, f"session {number} has lost something"

    def suspend(self, number: int) -> None:
        self.one.client().suspend_microvm(microvmIdentifier=self.vms[number]["microvmId"])

    def asleep(self, number: int) -> None:
        self.suspend(number)
        self.one.state(self.vms[number]["microvmId"], "SUSPENDED")

    def state(self, number: int) -> str:
        return str(self.one.describe(self.vms[number]["microvmId"])["state"])

    def files(self, number: int) -> list[str]:
        return sorted(path.name for path in (self.one.root / "sessions" / self.vms[number]["microvmId"]).glob("*"))

    # ---- steps: each returns what it waits for, or for the time after which it has settled without that ----

    def launch(self) -> Callable[[], Any]:
        with contextlib.suppress(ClientError):
            self.new.append(self.one.client().run_microvm(imageIdentifier=self.image)["microvmId"])
        return lambda: all(self.one.describe(new)["state"] in ("RUNNING", "TERMINATED") for new in self.new)

    def fall_asleep(self) -> Callable[[], Any]:
        self.suspend(0)
        return lambda: self.state(0) == "SUSPENDED"

    def wake(self) -> Callable[[], Any]:
        with contextlib.suppress(ClientError):
            self.one.client().resume_microvm(microvmIdentifier=self.vms[0]["microvmId"])
        return lambda: self.state(0) in ("RUNNING", "SUSPENDED")

    def cool(self) -> Callable[[], Any]:
        self.suspend(1)  # there is room for one warm sleeper: the first one cools
        return lambda: self.vms[0]["microvmId"] not in self.one.hypervisors()

    def rest(self) -> Callable[[], Any]:
        return lambda: not self.files(0)

    def fold(self) -> Callable[[], Any]:
        """Of the chain of a session that has cooled, or that could not be put to sleep."""
        self.suspend(0)
        return lambda: len(self.files(0)) <= 2

    def both_asleep(self) -> None:
        self.asleep(0)
        self.asleep(1)

    def long_chain(self) -> None:
        for _ in range(5):
            self.asleep(0)
            self.use(0)


STEPS: dict[str, tuple[Callable[[Case], None], Callable[[Case], Callable[[], Any]]]] = {
    "launch": (lambda case: None, Case.launch),
    "suspend": (lambda case: None, Case.fall_asleep),
    "resume": (lambda case: case.asleep(0), Case.wake),
    "cool": (lambda case: case.asleep(0), Case.cool),
    "fold": (Case.long_chain, Case.fold),
    "archive": (Case.both_asleep, Case.rest),
}


def take(case: Case, step: str, nth: int, error: str) -> tuple[int, str, list[str]]:
    """Takes a step with a fault in it; the calls it made, the one that failed, and what is wrong after it."""
    arrange, act = STEPS[step]
    wrong: list[str] = []
    for number in range(2):
        case.use(number)
    arrange(case)
    case.hand.arm(nth, error)
    reached = act(case)
    with contextlib.suppress(TimeoutError):
        until(reached, _SETTLED_SECONDS, 0.05)
    calls = case.hand.disarm()
    struck = case.hand.struck
    for number in range(2):
        try:
            case.use(number)
        except (AssertionError, TimeoutError) as failed:
            wrong.append(f"{failed}: {case.one.describe(case.vms[number]['microvmId'])}")
    wrong += ended(case)
    return calls, struck, wrong


def ended(case: Case) -> list[str]:
    """What is left of the sessions that the step launched, once they are over."""
    case.one.terminate(*case.new)
    known, case.new = {vm["microvmId"] for vm in case.vms}, []

    def left() -> set[str]:
        kept = {path.name for path in (case.one.root / "sessions").iterdir() if path.is_dir()} | set(case.one.hypervisors())
        return {*kept, *(path.name for path in (case.one.root / "quarantine").glob("*"))} - known

    with contextlib.suppress(TimeoutError):
        until(lambda: not left(), 10)
    return [f"left: {name}" for name in left()]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DurableStore]:
    directory = tmp_path / "objects"
    directory.mkdir()
    one = DurableStore(directory, _KEY, _SECRET)
    one.start()
    try:
        yield one
    finally:
        one.kill()


@pytest.fixture
def case(host_before: object, store: DurableStore) -> Iterator[Case]:
    one = Instance(
        "faulty", 700_000 + 6 * 262_144, OBJECT_STORE__EMBEDDED="false", OBJECT_STORE__ENDPOINT=store.endpoint, OBJECT_STORE__ACCESS_KEY=_KEY,
        OBJECT_STORE__SECRET_KEY=_SECRET, ARCHIVE__AFTER_SECONDS="2", STANDBYS__WARM="1", STANDBYS__WARM_SECONDS="1", STANDBYS__PER_IMAGE="1",
        EDGE__WORKERS="1",
    )  # fmt: skip
    one.client = functools.partial(_client, one, store, one.client)  # type: ignore[method-assign]
    hand = Hand(one)
    try:
        hand.start()
        made = Case(one, hand, ledger_image(one))
        yield made
        one.terminate(*(vm["microvmId"] for vm in made.vms))
    finally:
        if one.process is not None:
            one.stop()
        hand.close()
        log = one.log.read_text()
        one.remove()
    assert "Traceback" not in log, log[log.index("Traceback") :][:4000]


def _client(one: Instance, store: DurableStore, own: Callable[[str], Any], name: str = "lambda-microvms") -> Any:
    return store.client() if name == "s3" else own(name)


def test_a_call_of_vmm_that_fails_once_loses_nothing(case: Case) -> None:
    began, counted = time.monotonic(), {}
    wrong, never = [], []
    for step in STEPS:
        counted[step], _, found = take(case, step, -1, "EIO")
        wrong += [f"{step}: {one}" for one in found]
    for step, error, place in SAMPLE:
        share = place
        for _ in range(_TRIES):  # what goes on beside a step makes calls as well, one time more than another
            nth = int(counted[step] * share)
            calls, struck, found = take(case, step, nth, error)
            print(f"{step}: call {nth} of {calls}, {error}: {struck or 'not made'}")
            wrong += [f"{step}, {error} of {struck}: {one}" for one in found]
            if struck:
                break
            counted[step], share = min(counted[step], calls), share / 2
        else:
            never.append((step, error))
    print(f"{len(SAMPLE) - len(never)} faults in {time.monotonic() - began:.0f} s, {len(wrong)} losses; calls: {counted}")
    assert not wrong
    assert not never, "faults that met no call"
