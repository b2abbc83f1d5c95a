"""The wall around tokens that were lost: the operator takes them back, and no worker takes one from then on. A new key is no token's end.

Taken away by name: the compare with what was revoked (gateway/tokens.py, Checker), and the order in which a new key is told and used.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from edge_rig import Rig, response
from waiting import turns

from gateway import messages as m
from gateway.sessions.routes import Routes
from gateway.tokens import LONGEST_SECONDS, ROTATE_SECONDS, Checker, Grant, Minter, TokenError

NOW = 1_800_000_000.0


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def minter(tmp_path: Path, clock: Clock) -> Minter:
    return Minter(tmp_path / "keys.json", clock)


def takes(minter: Minter, token: str, now: float = NOW, revoked: m.Revoked | None = None) -> bool:
    try:
        Checker(minter.verifiers(), minter.revoked if revoked is None else revoked).verify(token, now)
    except TokenError as error:
        assert str(error) == "revoked"
        return False
    return True


@pytest.mark.parametrize(("revoked", "refused"), [("", {"a", "b"}), ("a", {"a"}), ("c", set())])
def test_what_was_minted_before_is_refused(minter: Minter, clock: Clock, revoked: str, refused: set[str]) -> None:
    """Without the compare each is good until it expires."""
    tokens = {name: minter.mint(name, [(1, 1)], 600) for name in ("a", "b")}
    clock.now += 1
    minter.revoke(clock.now, revoked)
    assert {name for name, token in tokens.items() if not takes(minter, token, clock.now)} == refused
    assert all(takes(minter, token, clock.now, m.Revoked()) for token in tokens.values())
    assert all(takes(minter, minter.mint(name, [(1, 1)], 600), clock.now) for name in tokens), "what is minted since is good"


def test_a_moment_of_before_spares_what_came_later(minter: Minter, clock: Clock) -> None:
    first = minter.mint("a", [(1, 1)], 600)
    clock.now += 10
    second = minter.mint("a", [(1, 1)], 600)
    minter.revoke(NOW + 5)
    assert not takes(minter, first) and takes(minter, second)
    minter.revoke(NOW + 1)
    assert not takes(minter, first), "an earlier moment takes nothing back"
    with pytest.raises(ValueError, match="yet to come"):
        minter.revoke(clock.now + 1)


def test_a_token_of_an_older_version_is_older_than_any_moment(minter: Minter) -> None:
    """It does not say when it was minted."""
    checker = Checker(minter.verifiers(), m.Revoked(before=1.0))
    checker._seen = lambda token: Grant("a", ((1, 1),), NOW + 60, "proxy", "k")  # type: ignore[assignment]
    with pytest.raises(TokenError, match="revoked"):
        checker.verify("x", NOW)


def test_a_clock_that_was_set_back_mints_no_revoked_tokens(minter: Minter, clock: Clock) -> None:
    minter.revoke(clock.now)
    clock.now -= 3000
    assert takes(minter, minter.mint("a", [(1, 1)], 600), clock.now)


@pytest.mark.parametrize("other", ["b", "", "a"])
def test_what_was_revoked_stays_so_where_a_clock_was_wrong_for_a_while(minter: Minter, clock: Clock, other: str) -> None:
    """It was far ahead when something else was revoked, by which time what was revoked before had expired; then it is set right."""
    token = minter.mint("a", [(1, 1)], 600)
    clock.now += 1
    minter.revoke(clock.now, "a")
    clock.now += 10 * LONGEST_SECONDS
    minter.revoke(NOW, other)
    assert set(minter.revoked.sessions) <= {other}
    clock.now = NOW + 2
    assert not takes(minter, token, clock.now)
    assert takes(minter, minter.mint("a", [(1, 1)], 600), clock.now)


@pytest.mark.parametrize("revoked", ["a", ""])
def test_what_was_minted_while_the_clock_was_ahead_is_taken_back(tmp_path: Path, minter: Minter, clock: Clock, revoked: str) -> None:
    """By moments alone it would be minted after it was revoked: the attack shows it then, and when its time has come."""
    clock.now += 1800
    token = minter.mint("a", [(1, 1)], LONGEST_SECONDS)
    clock.now = NOW + 1
    assert minter.revoke(0.0, revoked) == clock.now
    by_moments = m.Revoked(minter.revoked.before, minter.revoked.sessions)
    again = Minter(tmp_path / "keys.json", clock)
    for _ in range(2):
        assert takes(minter, token, clock.now, by_moments)
        assert not takes(minter, token, clock.now) and not takes(again, token, clock.now)
        assert takes(again, again.mint("a", [(1, 1)], 600), clock.now)
        clock.now = NOW + 1801
    clock.now = NOW + 2 + LONGEST_SECONDS
    again.revoke(0.0, "b")
    assert set(again.revoked.sessions) == set(again.revoked.numbers) == {"b"}
    assert not takes(again, token, clock.now), "what is no longer kept of one session is kept of all"
    assert takes(again, again.mint("a", [(1, 1)], 600), clock.now)


def test_a_session_whose_tokens_are_taken_back_costs_no_other_its_own(minter: Minter, clock: Clock) -> None:
    """Nor does a moment of before what was minted since."""
    other = minter.mint("b", [(1, 1)], 600)
    clock.now += 1
    minter.revoke(0.0, "a")
    assert takes(minter, other, clock.now)
    first = minter.mint("a", [(1, 1)], 600)
    clock.now += 1
    minter.revoke(NOW + 0.5)
    assert takes(minter, first, clock.now) and not takes(minter, other, clock.now)


def test_what_was_revoked_outlives_control_and_then_goes(tmp_path: Path, minter: Minter, clock: Clock) -> None:
    token = minter.mint("a", [(1, 1)], 600)
    clock.now += 1
    minter.revoke(clock.now, "a")
    again = Minter(tmp_path / "keys.json", clock)
    assert not takes(again, token, clock.now) and again.revoked == minter.revoked
    clock.now += LONGEST_SECONDS
    again.revoke(clock.now, "b")
    assert set(again.revoked.sessions) == {"b"}, "no token of before that moment is left"


def test_keys_are_a_list_where_there_is_nothing_more_to_say(tmp_path: Path, minter: Minter) -> None:
    """As an older version reads it."""
    assert isinstance(msgspec.json.decode((tmp_path / "keys.json").read_bytes()), list)


# ---- at the edge ----


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    one = Rig(tmp_path, monkeypatch)
    await one.start()
    yield one
    await one.stop()


@pytest.mark.parametrize(
    ("revoked", "status"),
    [(m.Revoked(), 200), (m.Revoked(sessions={"s2": 9e9}), 200), (m.Revoked(sessions={"s1": 9e9}), 403), (m.Revoked(before=9e9), 403)],
)
async def test_a_connection_that_was_served_is_served_no_more(rig: Rig, revoked: m.Revoked, status: int) -> None:
    """Also where the worker remembers the head and its verdict."""
    reader, writer = await rig.open()
    for _ in range(4):
        writer.write(rig.request())
        assert (await response(reader))[0] == 200
    (connection,) = rig.control.connections
    assert await connection.call("tokens", m.KeySet(rig.minter.verifiers(), revoked), bool)
    writer.write(rig.request())
    assert (await response(reader))[0] == status
    writer.close()


# ---- at edges that are away ----


class Worker:
    """Verifies by what it was told last; says so when it is let."""

    def __init__(self, keys: m.KeySet) -> None:
        self.checker = Checker(keys.keys, keys.revoked)
        self.may = asyncio.Event()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_closed = False

    async def start_call(self, method: str, body: m.KeySet, kind: Any, seconds: float) -> tuple[bool, list[int]]:
        async with asyncio.timeout(seconds):
            await self.may.wait()
        self.checker = Checker(body.keys, body.revoked)
        return True, []

    def close(self) -> None:
        self.is_closed = True


async def test_a_worker_that_is_away_is_waited_for(minter: Minter, clock: Clock) -> None:
    """It goes on by what it knew when it lost its connection: the attack is a request to it once the command has ended. Those that are
    here do not wait for it."""
    routes = Routes(2, 60.0)
    away, here = Worker(minter.key_set()), Worker(minter.key_set())
    for one in (away, here):
        one.may.set()
    routes.add_worker(here, "edge-0")  # type: ignore[arg-type]
    token = minter.mint("a", [(1, 1)], 600)
    clock.now += 1
    minter.revoke(clock.now)
    publishing = asyncio.ensure_future(routes.publish_keys(minter.key_set()))
    await turns()
    with pytest.raises(TokenError, match="revoked"):
        here.checker.verify(token, clock.now)
    assert away.checker.verify(token, clock.now) and not publishing.done()
    routes.add_worker(away, "edge-1")  # type: ignore[arg-type]
    assert await publishing
    with pytest.raises(TokenError, match="revoked"):
        away.checker.verify(token, clock.now)


async def test_while_a_worker_stays_away_nothing_is_said_to_be_done(minter: Minter) -> None:
    routes = Routes(2, 0.0)
    here, away = Worker(minter.key_set()), Worker(minter.key_set())
    for one in (here, away):
        one.may.set()
    routes.add_worker(here, "edge-0")  # type: ignore[arg-type]
    assert not await routes.publish_keys(minter.key_set())
    routes.add_worker(away, "edge-1")  # type: ignore[arg-type]
    assert await routes.publish_keys(minter.key_set())


# ---- a new key ----


@pytest.mark.parametrize("is_told_first", [True, False])
async def test_no_token_is_refused_while_the_key_changes(tmp_path: Path, clock: Clock, is_told_first: bool) -> None:
    """Tokens are minted all the while. With a key that signs before the workers have it, theirs are refused."""
    minter = Minter(tmp_path / "keys.json", clock)
    clock.now += ROTATE_SECONDS
    routes = Routes(1, 0.1)
    worker = Worker(minter.key_set())
    routes.add_worker(worker, "edge-0")  # type: ignore[arg-type]
    minter.make_key()
    if not is_told_first:
        minter.use_newest()
    telling = asyncio.ensure_future(routes.publish_keys(minter.key_set()))
    await asyncio.sleep(0)
    token = minter.mint("a", [(1, 1)], 60)
    if is_told_first:
        assert worker.checker.verify(token, clock.now).session == "a"
    else:
        with pytest.raises(TokenError, match="unknown key"):
            worker.checker.verify(token, clock.now)
    worker.may.set()
    await telling
    minter.use_newest()
    new = minter.mint("a", [(1, 1)], 60)
    assert worker.checker.verify(new, clock.now).kid != worker.checker.verify(token, clock.now).kid or not is_told_first


async def test_a_worker_that_does_not_say_so_is_sent_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the whole table when it is back; the others wait for it no longer."""
    monkeypatch.setattr("gateway.sessions.routes._KEYS_SECONDS", 0.05)
    minter = Minter(tmp_path / "keys.json")
    routes = Routes(1, 0.1)
    silent, well = Worker(minter.key_set()), Worker(minter.key_set())
    well.may.set()
    for one in (silent, well):
        routes.add_worker(one, "edge-0")  # type: ignore[arg-type]
    assert not await routes.publish_keys(minter.key_set())
    assert silent.is_closed and not well.is_closed
    assert routes.table().keys == minter.verifiers() and routes.table().revoked == minter.revoked


def test_a_key_that_was_made_and_did_not_sign_before_a_restart_signs_later(tmp_path: Path, clock: Clock) -> None:
    """Control ended between making and telling: workers of before do not know it."""
    minter = Minter(tmp_path / "keys.json", clock)
    old = minter.verifiers()
    clock.now += ROTATE_SECONDS
    assert minter.make_key_if_due()
    again = Minter(tmp_path / "keys.json", clock)
    assert Checker(old).verify(again.mint("a", [(1, 1)], 60), clock.now).session == "a"
    assert again.make_key_if_due() and len(again.verifiers()) == 2, "the one that is there is told"
