"""The session table: complete for calls, closed at its end, and free of dead ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.sessions.states import CALLS, LATE, TABLE, Action, Event, IllegalTransition, State, step

# What an action ends with (gateway/sessions/actions.py): each outcome must have a cell where the action runs.
OUTCOMES = {
    Action.SAVE: (State.SUSPENDING, {Event.SAVED, Event.CALLED_OFF, Event.NOT_SAVED, Event.FAILED, Event.LOST}),
    Action.WAKE: (State.RESUMING, {Event.RESUMED, Event.NOT_RESUMED, Event.FAILED, Event.LOST}),
    Action.DESTROY: (State.TERMINATING, {Event.CLEANED}),
    Action.SET_ASIDE: (State.TERMINATING, {Event.CLEANED}),
}
# Service reference, section 2: what a call answers in each state.
DOCUMENTED = {
    (State.PENDING, Event.SUSPEND): Action.CONFLICT,
    (State.RUNNING, Event.SUSPEND): Action.SAVE,
    (State.SUSPENDED, Event.SUSPEND): Action.NONE,
    (State.SUSPENDED, Event.RESUME): Action.WAKE,
    (State.RUNNING, Event.RESUME): Action.NONE,
    (State.TERMINATED, Event.SUSPEND): Action.REFUSE,
    (State.TERMINATED, Event.RESUME): Action.REFUSE,
    (State.TERMINATED, Event.TERMINATE): Action.NONE,
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", sorted(CALLS))
def test_every_call_has_an_answer_in_every_state(state: State, event: Event) -> None:
    step(state, event)


@pytest.mark.parametrize(("cell", "action"), DOCUMENTED.items())
def test_documented_cells(cell: tuple[State, Event], action: Action) -> None:
    assert step(*cell)[1] is action


@pytest.mark.parametrize("action", OUTCOMES)
def test_every_outcome_of_an_action_has_a_cell(action: Action) -> None:
    state, outcomes = OUTCOMES[action]
    for event in outcomes:
        assert (state, event) in TABLE


def test_entering_a_state_starts_the_action_that_leaves_it() -> None:
    """Nobody may end up in a state in which nothing is under way and nothing will happen."""
    for (state, event), (new, action) in TABLE.items():
        if new is state:
            assert action in (Action.NONE, Action.DEFER, Action.CONFLICT, Action.REFUSE), (state, event)
            continue
        expected = {
            State.SUSPENDING: {Action.SAVE}, State.RESUMING: {Action.WAKE}, State.TERMINATING: {Action.DESTROY, Action.SET_ASIDE},
            State.RUNNING: {Action.OPEN}, State.SUSPENDED: {Action.REST, Action.NONE}, State.TERMINATED: {Action.NONE},
        }[new]  # fmt: skip
        assert action in expected, (state, event)


# What deletes a session's files: the user's word, the policy's, and the end of the application itself.
WORDS = {Event.TERMINATE, Event.EXPIRED, Event.WINDOW_OVER, Event.EXITED}


def test_no_error_deletes_what_was_saved() -> None:
    """Only of a launch, of which nothing was saved yet."""
    for (state, event), (_, action) in TABLE.items():
        if action is Action.DESTROY:
            assert event in WORDS or state is State.PENDING, (state, event)
        if action is Action.SET_ASIDE:
            assert event in (Event.LOST, Event.FAILED), (state, event)


def test_only_late_events_may_be_ignored() -> None:
    assert not CALLS & LATE and set(Event) == CALLS | LATE


def test_an_unknown_call_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TABLE, (State.RUNNING, Event.SUSPEND))
    with pytest.raises(IllegalTransition):
        step(State.RUNNING, Event.SUSPEND)


@given(st.lists(st.sampled_from(Event), max_size=60))
def test_walks(events: list[Event]) -> None:
    """Over is over, but for what the operator brings back; a suspended state is only reached through a snapshot; users never read RESUMING."""
    state = State.PENDING
    for event in events:
        new, action = step(state, event)
        if state.is_ended and event is not Event.RECOVERED:
            assert new.is_ended and action in (Action.NONE, Action.REFUSE)
        if state is State.TERMINATED and event is not Event.RECOVERED:
            assert new is State.TERMINATED
        if new is State.SUSPENDED and state is not State.SUSPENDED:
            assert (state, event) in (
                (State.SUSPENDING, Event.SAVED), (State.RESUMING, Event.NOT_RESUMED), (State.TERMINATED, Event.RECOVERED)
            )  # fmt: skip
        if new is State.RUNNING and state is not State.RUNNING:
            assert state in (State.PENDING, State.SUSPENDING, State.RESUMING)
        assert new.public in ("PENDING", "RUNNING", "SUSPENDING", "SUSPENDED", "TERMINATING", "TERMINATED")
        state = new


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_terminate_always_leads_out(events: list[Event]) -> None:
    state = State.PENDING
    for event in events:
        state, _ = step(state, event)
    new, action = step(state, Event.TERMINATE)
    if action is Action.DEFER:
        new, action = step(step(state, Event.SAVED)[0], Event.TERMINATE)
    assert new.is_ended
