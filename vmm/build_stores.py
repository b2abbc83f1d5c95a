"""Layer stores of container builds: one for each account, with user ids that no other account's builds have.

A store is a cache. What is dropped is set aside under a name of its own, which takes no time, and removed later.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import threading
import time
from pathlib import Path

import structlog

from .errors import VmmError

log = structlog.get_logger()

_RECENT_SECONDS = 60.0  # a store that was opened so lately is about to be used
RANGE = 1 << 20  # ids of one account's builds: an image's own, and after them those that it names beyond
_SINGLE = 256  # of them, for ids that an image names beyond; the kernel takes 340 lines (user_namespaces(7))
_WHOLE = RANGE - _SINGLE  # the first id that an image's own do not reach; the kernel takes none twice
DROPPED = ".dropped-"


class Stores:
    """Each account's layer store, with its range of ids and the single ids that its images named.

    A store's directory is its record: the owner of its inside is the range's first id, the file `users` lists the single ids in the order
    in which they are mapped, and its time is that of the last build.
    """

    def __init__(self, directory: Path, first_uid: int) -> None:
        self._directory = directory
        self._first_uid = first_uid
        self._one_at_a_time = threading.Lock()  # or two accounts that are new at once would find the same range free

    def open(self, account: str, users: list[int]) -> tuple[Path, int, list[int]]:
        """Returns the store, made where it is missing, its first id, and all its single ids. Raises VmmError."""
        with self._one_at_a_time:
            return self._open(account, users)

    def _open(self, account: str, users: list[int]) -> tuple[Path, int, list[int]]:
        if not re.fullmatch(r"[\w-]+", account):
            raise VmmError(f"account {account!r} has no layer store")
        place = self._directory / account
        store = place / "store"
        if not store.exists():
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            taken = {one.stat().st_uid for one in self._directory.glob("*/store")}
            first = next(uid for uid in range(self._first_uid, 1 << 32, RANGE) if uid not in taken)
            if first + RANGE >= 1 << 32:
                raise VmmError("no range of user ids is free for another account's builds: users.builders says where they begin")
            made = place / "store.new"
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(mode=0o700)
            os.chown(made, first, first)
            made.rename(store)
        known = self._users(place)
        beyond = [user for user in users if user >= _WHOLE]
        wanted = known + [user for user in beyond if user not in known]
        if len(set(beyond)) > _SINGLE:
            raise VmmError(f"the image names {len(set(beyond))} user ids beyond a million: {_SINGLE} are mapped")
        if len(wanted) > _SINGLE:  # any layer may have files of any of them: the ids are free again without the layers
            log.info("store.renewed", account=account, ids=len(wanted))
            self._set_aside(account)
            return self._open(account, users)
        (place / "users.new").write_text(" ".join(map(str, wanted)), encoding="ascii")
        (place / "users.new").rename(place / "users")
        return store, store.stat().st_uid, wanted

    def drop(self, account: str) -> None:
        """Has the account's next build begin with an empty store."""
        with self._one_at_a_time:
            self._set_aside(account)
        self.sweep()

    def _set_aside(self, account: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._directory / account).rename(self._directory / f"{DROPPED}{secrets.token_hex(4)}")

    def sweep(self) -> None:
        """Removes what was dropped, also by a daemon of before."""
        remove_dropped(self._directory)

    def drop_unused(self, days: float, used: set[str]) -> None:
        """Removes what no build has used for so long; `used` are of accounts that build now."""
        self._drop_older(days * 86400, used)
        self.sweep()

    def give_up(self, used: set[str]) -> bool:
        """Removes the store that was used longest ago, since its room is wanted. Returns False where there is none."""
        found = self._drop_older(_RECENT_SECONDS, used, most=1)
        self.sweep()
        return found > 0

    def _drop_older(self, seconds: float, used: set[str], most: int = 1 << 30) -> int:
        ages: list[tuple[float, str]] = []
        for place in self._directory.glob("*"):
            if not place.name.startswith(DROPPED) and place.name not in used:
                with contextlib.suppress(OSError):
                    ages.append(((place / "users").stat().st_mtime, place.name))
        dropped = 0
        for _, account in sorted(ages):
            with contextlib.suppress(OSError), self._one_at_a_time:  # no build may begin in it meanwhile
                if dropped < most and (self._directory / account / "users").stat().st_mtime < time.time() - seconds:
                    self._set_aside(account)
                    dropped += 1
        return dropped

    def _users(self, place: Path) -> list[int]:
        with contextlib.suppress(OSError, ValueError):
            return [user for user in map(int, (place / "users").read_text(encoding="ascii").split()) if user >= _WHOLE]
        return []


def remove_dropped(directory: Path) -> None:
    for path in directory.glob(f"{DROPPED}*"):
        shutil.rmtree(path, ignore_errors=True)


def id_maps(option: str, first: int, single: list[int]) -> str:
    """Returns arguments of unshare(1): an image's ids up to a million and some, then each of the single ones."""
    maps = [f"--{option}=0:{first}:{_WHOLE}", *(f"--{option}={user}:{first + _WHOLE + number}:1" for number, user in enumerate(single))]
    return " ".join(maps)
