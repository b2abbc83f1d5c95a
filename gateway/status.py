"""What the supervisor writes down of its processes: for its successor, for `torpor reload`, and for control's /healthz."""

from __future__ import annotations

from pathlib import Path

import msgspec

from vmm import syscalls

from .config import Settings


class Recorded(msgspec.Struct):
    """A process as the state file has it: `serves` is false of one that is starting or was replaced. `started` is its start time in
    clock ticks, which with the pid names it for ever."""

    name: str
    pid: int
    started: int | None
    serves: bool
    sockets: dict[str, list[int]]


class ChildState(msgspec.Struct):
    """Whether a process serves, and since when it does or does not (Unix time); how often it was started again, and why it was not yet."""

    name: str
    serves: bool
    since: float
    restarts: int = 0
    failure: str = ""


class State(msgspec.Struct):
    """`failed_at`, `failure`: of the last reload that failed. `pid`, `started`: of the supervisor."""

    processes: list[Recorded] = []
    children: list[ChildState] = []
    failed_at: float = 0.0
    failure: str = ""
    pid: int = 0
    started: int = 0


def in_words(child: ChildState, now: float) -> tuple[bool, str]:
    """Whether it serves, and what there is to say of it."""
    took = f"for {max(0, now - child.since):.0f} s"
    again = f", started again {child.restarts} times" if child.restarts else ""
    return child.serves, f"serves {took}{again}" if child.serves else f"does not serve {took}{again}: {child.failure or 'it is starting'}"


def checks(path: Path, now: float) -> dict[str, tuple[bool, str]]:
    """Of each process, as the state file has it."""
    try:
        return {child.name: in_words(child, now) for child in read_state(path).children}
    except (OSError, ValueError) as error:
        return {"supervisor": (False, f"{path.name} cannot be read: {error}")}


def state_file(settings: Settings) -> Path:
    return settings.runtime / "supervisor.json"


def read_state(path: Path) -> State:
    """Raises OSError, ValueError."""
    return msgspec.json.decode(path.read_bytes(), type=State)


def living(path: Path) -> list[Recorded]:
    """Processes of an earlier supervisor that still run."""
    try:
        recorded = read_state(path).processes
    except (OSError, ValueError):
        return []
    return [process for process in recorded if is_living(process)]


def is_living(process: Recorded) -> bool:
    """Whether that very process runs: its pid may be another's by now."""
    return process.started is not None and syscalls.start_time(process.pid) == process.started
