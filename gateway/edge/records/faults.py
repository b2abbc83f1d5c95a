"""What was wrong with an application becomes lines for its microVM's log, which are bounded, and each said once.

A client is told 502 and nothing else (service reference, 3.4). Whoever runs the microVM finds the reason in its log, which
control writes. An application that fails on every request must not fill that log: within a window each text is written at
once when it is new, and its repetitions become one line with their number when the window ends.
"""

from __future__ import annotations

from collections.abc import Callable

WINDOW_SECONDS = 10.0
TEXTS_MAX = 16  # different texts of one session in a window; the number of the others is written
SESSIONS_MAX = 1024  # with faults in a window; faults of further ones are not written
TEXT_MAX_CHARACTERS = 300


class _Window:
    """Keeps the faults of one session since `began`."""

    __slots__ = ("began", "fresh", "omitted", "repeats")

    def __init__(self, began: float) -> None:
        self.began = began
        self.fresh: list[str] = []  # not written yet
        self.repeats: dict[str, int] = {}  # by text: how often it came again
        self.omitted = 0

    def summary(self) -> list[str]:
        """Returns the lines at the window's end."""
        lines = [f"{text} ({count} more in {WINDOW_SECONDS:.0f} s)" for text, count in self.repeats.items() if count]
        if self.omitted:
            lines.append(f"{self.omitted} other faults in {WINDOW_SECONDS:.0f} s")
        return lines


class FaultLines:
    """Collects faults by session until `take` fetches the lines that are due."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._windows: dict[str, _Window] = {}

    def add(self, session: str, text: str) -> None:
        window = self._windows.get(session)
        if window is None:
            if len(self._windows) >= SESSIONS_MAX:
                return
            window = self._windows[session] = _Window(self._clock())
        text = text[:TEXT_MAX_CHARACTERS]
        if text in window.repeats:
            window.repeats[text] += 1
        elif len(window.repeats) < TEXTS_MAX:
            window.repeats[text] = 0
            window.fresh.append(text)
        else:
            window.omitted += 1

    def take(self) -> dict[str, list[str]]:
        """Returns the lines that are due, by session. A session without faults in a whole window is forgotten."""
        if not self._windows:
            return {}
        now = self._clock()
        due: dict[str, list[str]] = {}
        for session, window in list(self._windows.items()):
            lines = window.fresh
            window.fresh = []
            if now - window.began >= WINDOW_SECONDS:
                del self._windows[session]
                lines = lines + window.summary()
            if lines:
                due[session] = lines
        return due
