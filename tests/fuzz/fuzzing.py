"""A fuzzer of parsers: inputs are mutated from valid ones, and those that reach lines in a new order are mutated on.

A target is a module of targets/: `TRACED` are the names of the modules whose lines guide it, `seeds()` are valid inputs, `WORDS` pieces that
its language has, and `check(data)` raises for what is a finding. A target may `make` inputs itself, where bytes that are changed at random
would hardly ever be in its language.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import os
import random
import resource
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
_MOST_BYTES = 4096  # of an input
_INPUT_SECONDS = 2.0  # of this process's processor time: the slowest takes some milliseconds
_INPUT_KIB = 96 << 10  # by which one input may raise what the process holds
_POOL = 2000
_NUMBERS = (
    0,
    1,
    2,
    4,
    9,
    16,
    32,
    63,
    64,
    127,
    128,
    254,
    255,
    256,
    1000,
    4095,
    4096,
    16383,
    16384,
    32767,
    32768,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
)


class TooLong(BaseException):
    """An input takes longer than any may. No handler of the code that is tried takes it for an error of its own."""


@dataclass
class Finding(Exception):
    """`data` is the input that the error came of."""

    target: str
    seed: int
    data: bytes
    error: BaseException

    def __str__(self) -> str:
        return f"{self.target} (FUZZ_SEED={self.seed}): {self.error!r} of {len(self.data)} bytes: {self.data!r}"


@dataclass
class Ran:
    executions: int = 0
    seconds: float = 0.0
    kept: int = 0  # inputs that reached something new
    findings: list[Finding] = field(default_factory=list)


def names() -> list[str]:
    return sorted(path.stem for path in (HERE / "targets").glob("*.py"))


def target(name: str) -> Any:
    return importlib.import_module(f"fuzz.targets.{name}")


def corpus(name: str) -> list[bytes]:
    """Returns what was found once, or is known to be worth a try: it is tried first, and mutated on."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What refuses an input says so in its log, thousands of times a second."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), cache_logger_on_first_use=False)
    try:
        yield
    finally:
        structlog.configure(**before)


def _alarm(number: int, frame: types.FrameType | None) -> None:
    raise TooLong(f"an input took more than {_INPUT_SECONDS:g} s of the processor")


@contextlib.contextmanager
def _timer() -> Iterator[None]:
    before = signal.signal(signal.SIGVTALRM, _alarm)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def try_once(check: Callable[[bytes], None], data: bytes) -> BaseException | None:
    """Returns what is wrong with what an input makes of the code, None where nothing is."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, _INPUT_SECONDS)
        check(data)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust's is no Exception
        return error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if (more := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) > _INPUT_KIB:
        return MemoryError(f"an input took {more >> 10} MiB")
    return None


def replay(name: str, data: bytes) -> None:
    """Raises what `check` raises, and TooLong or MemoryError beside that."""
    with quiet(), _timer():
        error = try_once(target(name).check, data)
    if error is not None:
        raise error


class Coverage:
    """Pairs of lines that follow each other in the modules that are traced, and how often they do, by powers of two (sys.settrace: there is
    no cheaper way in Python 3.11)."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        files = {importlib.import_module(module).__file__ for module in modules}
        self._files = {file for file in files if file is not None and file.endswith(".py")}
        self._seen: set[tuple[tuple[int, int], int]] = set()
        self._counts: dict[tuple[int, int], int] = {}
        self._last = 0

    def _line(self, frame: types.FrameType, event: str, value: Any) -> Any:
        if event == "line":
            pair = (self._last, frame.f_lineno)
            self._counts[pair] = self._counts.get(pair, 0) + 1
            self._last = frame.f_lineno
        return self._line

    def _call(self, frame: types.FrameType, event: str, value: Any) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        self._counts, self._last = {}, 0
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    def has_grown(self) -> bool:
        """Whether the last input did what none has done before."""
        now = {(pair, count.bit_length()) for pair, count in self._counts.items()}
        is_new = not now <= self._seen
        self._seen |= now
        return is_new


def mutate(rng: random.Random, pool: list[bytes], words: tuple[bytes, ...]) -> bytes:
    data = bytearray(rng.choice(pool))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 30)))
        what = rng.randrange(9)
        if what == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif what == 1 and data:
            data[at % len(data)] = rng.randrange(256)
        elif what == 2:
            del data[at:end]
        elif what == 3:
            data[at:at] = data[at:end] * rng.choice((1, 1, 2, 20))
        elif what == 4:
            size = rng.choice((1, 2, 4))
            data[at : at + size] = (rng.choice(_NUMBERS) & (1 << 8 * size) - 1).to_bytes(size, rng.choice(("big", "little")))
        elif what == 5:
            other = rng.choice(pool)
            begin = rng.randrange(len(other) + 1)
            data[at:] = other[begin:]
        elif what == 6:
            del data[at:]
        elif words:
            data[at : rng.choice((at, end))] = rng.choice(words)
    return bytes(data[:_MOST_BYTES])


def run(name: str, seconds: float, seed: int) -> Ran:
    """Tries inputs for that long, or until one is a finding. The same seed tries the same ones in the same order."""
    tried, rng, done = target(name), random.Random(f"{name} {seed}"), Ran()
    make: Callable[[random.Random], bytes] | None = getattr(tried, "make", None)
    coverage = Coverage(tried.TRACED)
    pool: list[bytes] = []
    first = [*tried.seeds(), *corpus(name)]
    began = time.monotonic()
    with quiet(), _timer():
        while first or time.monotonic() - began < seconds:
            if first:
                data = first.pop(0)
            elif make is not None and rng.randrange(2):
                data = make(rng)
            else:
                data = mutate(rng, pool, tried.WORDS)
            with coverage.tracing():
                error = try_once(tried.check, data)
            done.executions += 1
            if error is not None:
                done.findings.append(Finding(name, seed, data, error))
                break
            if coverage.has_grown() or not pool:
                done.kept += 1
                pool.append(data) if len(pool) < _POOL else pool.__setitem__(rng.randrange(_POOL), data)
    done.seconds = time.monotonic() - began
    return done


def seed_of_run(default: int | None) -> int:
    """FUZZ_SEED, else the given one, else another one each time."""
    given = os.environ.get("FUZZ_SEED")
    return int(given) if given else default if default is not None else random.SystemRandom().randrange(1 << 32)


def keep(finding: Finding, directory: Path) -> Path:
    """Writes a finding's input to a file, to be made small by hand."""
    path = directory / finding.target / hashlib.sha256(finding.data).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(finding.data)
    return path
