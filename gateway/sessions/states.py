"""The session's states are one table, and nothing else decides.

    PENDING -> RUNNING <-> SUSPENDING -> SUSPENDED -> RESUMING -> RUNNING ... -> TERMINATING -> TERMINATED

A cell says what an event means in a state: the next state and what is then done. A missing cell is a mistake of ours.
RESUMING is ours: users read SUSPENDED until the resume hook has answered (service reference, 2.1).

Two ways lead out. DESTROY is the user's word (TerminateMicrovm), the policy's (window, lifetime), or the application's own end; SET_ASIDE
is what every error ends in that cannot be got over: the files stay, and `torpor recover` may bring the session back.
"""

from __future__ import annotations

from enum import StrEnum

MAX_LIFETIME = "MicroVM exceeded maximum lifetime."
SUCCESS = "Success."


class State(StrEnum):
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUSPENDING = "SUSPENDING"
    SUSPENDED = "SUSPENDED"
    RESUMING = "RESUMING"
    TERMINATING = "TERMINATING"
    TERMINATED = "TERMINATED"

    @property
    def public(self) -> str:
        """Returns the state's name in the API."""
        return "SUSPENDED" if self is State.RESUMING else self.value

    @property
    def is_ended(self) -> bool:
        return self in (State.TERMINATING, State.TERMINATED)


class Event(StrEnum):
    # calls
    SUSPEND = "suspend"
    RESUME = "resume"
    TERMINATE = "terminate"
    # what the edge and the clock bring
    REQUEST = "request"
    IDLE = "idle"
    WINDOW_OVER = "window_over"
    EXPIRED = "expired"
    # what became of an action
    STARTED = "started"
    SAVED = "saved"
    CALLED_OFF = "called_off"
    NOT_SAVED = "not_saved"
    RESUMED = "resumed"
    NOT_RESUMED = "not_resumed"
    FAILED = "failed"
    CLEANED = "cleaned"
    # what happens by itself
    EXITED = "exited"
    LOST = "lost"
    # the operator's word
    RECOVERED = "recovered"  # its files are back from the quarantine


class Action(StrEnum):
    NONE = "none"
    OPEN = "open"  # the gate opens, the idle clock starts
    SAVE = "save"  # gate, hook, stop, snapshot
    REST = "rest"  # the hypervisor goes, the suspended window starts
    WAKE = "wake"  # load, start, hook
    DESTROY = "destroy"  # terminate hook where the guest runs, then everything goes
    SET_ASIDE = "set_aside"  # the hypervisor goes, and the files go to the quarantine: no error deletes what was saved
    DEFER = "defer"  # acted on when the action under way has ended
    CONFLICT = "conflict"  # 409
    REFUSE = "refuse"  # 400: terminated


_S, _E, _A = State, Event, Action
_END = (_S.TERMINATING, _A.DESTROY)
_ASIDE = (_S.TERMINATING, _A.SET_ASIDE)

TABLE: dict[tuple[State, Event], tuple[State, Action]] = {
    # PENDING: restored from the image, its run hook not answered yet; nothing of it was saved
    (_S.PENDING, _E.SUSPEND): (_S.PENDING, _A.CONFLICT),
    (_S.PENDING, _E.RESUME): (_S.PENDING, _A.NONE),
    (_S.PENDING, _E.TERMINATE): _END,
    (_S.PENDING, _E.REQUEST): (_S.PENDING, _A.NONE),
    (_S.PENDING, _E.EXPIRED): _END,
    (_S.PENDING, _E.STARTED): (_S.RUNNING, _A.OPEN),
    (_S.PENDING, _E.FAILED): _END,
    (_S.PENDING, _E.EXITED): _END,
    (_S.PENDING, _E.LOST): _END,
    # RUNNING
    (_S.RUNNING, _E.SUSPEND): (_S.SUSPENDING, _A.SAVE),
    (_S.RUNNING, _E.RESUME): (_S.RUNNING, _A.NONE),
    (_S.RUNNING, _E.TERMINATE): _END,
    (_S.RUNNING, _E.REQUEST): (_S.RUNNING, _A.NONE),
    (_S.RUNNING, _E.IDLE): (_S.SUSPENDING, _A.SAVE),
    (_S.RUNNING, _E.EXPIRED): _END,
    (_S.RUNNING, _E.EXITED): _END,
    (_S.RUNNING, _E.LOST): _ASIDE,
    # SUSPENDING: what would end it waits for the snapshot, because a guest half saved cannot be asked anything
    (_S.SUSPENDING, _E.SUSPEND): (_S.SUSPENDING, _A.NONE),
    (_S.SUSPENDING, _E.RESUME): (_S.SUSPENDING, _A.DEFER),
    (_S.SUSPENDING, _E.TERMINATE): (_S.SUSPENDING, _A.DEFER),
    (_S.SUSPENDING, _E.REQUEST): (_S.SUSPENDING, _A.DEFER),
    (_S.SUSPENDING, _E.EXPIRED): (_S.SUSPENDING, _A.DEFER),
    (_S.SUSPENDING, _E.SAVED): (_S.SUSPENDED, _A.REST),
    (_S.SUSPENDING, _E.CALLED_OFF): (_S.RUNNING, _A.OPEN),
    (_S.SUSPENDING, _E.NOT_SAVED): (_S.RUNNING, _A.OPEN),
    (_S.SUSPENDING, _E.FAILED): _ASIDE,
    (_S.SUSPENDING, _E.EXITED): _END,
    (_S.SUSPENDING, _E.LOST): _ASIDE,
    # SUSPENDED
    (_S.SUSPENDED, _E.SUSPEND): (_S.SUSPENDED, _A.NONE),
    (_S.SUSPENDED, _E.RESUME): (_S.RESUMING, _A.WAKE),
    (_S.SUSPENDED, _E.REQUEST): (_S.RESUMING, _A.WAKE),
    (_S.SUSPENDED, _E.TERMINATE): _END,
    (_S.SUSPENDED, _E.WINDOW_OVER): _END,
    (_S.SUSPENDED, _E.EXPIRED): _END,
    (_S.SUSPENDED, _E.LOST): _ASIDE,
    # RESUMING: before the guest runs its snapshot is still good, so a failure leads back
    (_S.RESUMING, _E.SUSPEND): (_S.RESUMING, _A.DEFER),
    (_S.RESUMING, _E.RESUME): (_S.RESUMING, _A.NONE),
    (_S.RESUMING, _E.REQUEST): (_S.RESUMING, _A.NONE),
    (_S.RESUMING, _E.TERMINATE): _END,
    (_S.RESUMING, _E.EXPIRED): _END,
    (_S.RESUMING, _E.RESUMED): (_S.RUNNING, _A.OPEN),
    (_S.RESUMING, _E.NOT_RESUMED): (_S.SUSPENDED, _A.NONE),
    (_S.RESUMING, _E.FAILED): _ASIDE,
    (_S.RESUMING, _E.EXITED): _END,
    (_S.RESUMING, _E.LOST): _ASIDE,
    # TERMINATING
    (_S.TERMINATING, _E.SUSPEND): (_S.TERMINATING, _A.REFUSE),
    (_S.TERMINATING, _E.RESUME): (_S.TERMINATING, _A.REFUSE),
    (_S.TERMINATING, _E.TERMINATE): (_S.TERMINATING, _A.NONE),
    (_S.TERMINATING, _E.CLEANED): (_S.TERMINATED, _A.NONE),
    # TERMINATED
    (_S.TERMINATED, _E.SUSPEND): (_S.TERMINATED, _A.REFUSE),
    (_S.TERMINATED, _E.RESUME): (_S.TERMINATED, _A.REFUSE),
    (_S.TERMINATED, _E.TERMINATE): (_S.TERMINATED, _A.NONE),
    (_S.TERMINATED, _E.RECOVERED): (_S.SUSPENDED, _A.NONE),
}

CALLS = frozenset({_E.SUSPEND, _E.RESUME, _E.TERMINATE})
# What is taken back where it cannot be stored: its caller is told, and may ask again. Whatever else happens has happened.
REVOCABLE = CALLS | {_E.RECOVERED}

# What may still come when a session is over or has moved on, and then means nothing.
LATE = frozenset({_E.IDLE, _E.WINDOW_OVER, _E.EXPIRED, _E.REQUEST, _E.EXITED, _E.LOST, _E.FAILED, _E.STARTED, _E.SAVED,
                  _E.CALLED_OFF, _E.NOT_SAVED, _E.RESUMED, _E.NOT_RESUMED, _E.CLEANED, _E.RECOVERED})  # fmt: skip


class IllegalTransition(Exception):
    """A call met a state for which the table has no cell."""


def reason_of(event: Event) -> str:
    """Returns the stateReason of a session that is terminated by this event, where the event alone says it."""
    return SUCCESS if event is Event.TERMINATE else MAX_LIFETIME if event in (Event.EXPIRED, Event.WINDOW_OVER) else ""


def exit_reason(code: int) -> str:
    return f"Container Stopped with Exit Code: {code}"


def step(state: State, event: Event) -> tuple[State, Action]:
    """Returns the table's cell; an event that comes too late does nothing. Raises IllegalTransition."""
    cell = TABLE.get((state, event))
    if cell is not None:
        return cell
    if event in LATE:
        return state, Action.NONE
    raise IllegalTransition(f"{event} in {state}")
