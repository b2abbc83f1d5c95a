"""Layer stores of container builds: one for each account, with user ids that no other account's builds have.

A store is a file system of its own in a sparse file, which the jail mounts (build-jail.sh): its size and its number of inodes are the
account's share, whatever a step does, and what a build removes is the host's again (discard). A store is a cache. What is dropped is set
aside under a name of its own, which takes no time, and removed later.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from .errors import VmmError

log = structlog.get_logger()

_RECENT_SECONDS = 60.0  # a store that was opened so lately is about to be used
RANGE = 1 << 20  # ids of one account's builds: an image's own, and after them those that it names beyond
_SINGLE = 256  # of them, for ids that an image names beyond; the kernel takes 340 lines (user_namespaces(7))
_WHOLE = RANGE - _SINGLE  # the first id that an image's own do not reach; the kernel takes none twice
DROPPED = ".dropped-"
_MAKE_SECONDS = 60
_INODE_BYTES = 16 << 10  # of a share, for each inode; as mke2fs(8) has it by itself


class Stores:
    """Each account's layer store, with its range of ids and the single ids that its images named.

    A store's directory is its record: the owner of `store` in it is the range's first id, the file `users` lists the single ids in the
    order in which they are mapped, and its time is that of the last build. `store` has the layers, or is empty beside the file that has
    them.
    """

    def __init__(self, directory: Path, first_uid: int, share: int = 0) -> None:
        """`share`: the bytes that each store may have of the disk; 0: a store is a plain directory, without a bound."""
        self._directory = directory
        self._first_uid = first_uid
        self._share = share
        self._one_at_a_time = threading.Lock()  # or two accounts that are new at once would find the same range free

    def open(self, account: str, users: list[int]) -> tuple[Path, int, list[int]]:
        """Returns the store, a directory or a file with a file system, made where it is missing or is not of today's share; its first id,
        and all its single ids. Raises VmmError, OSError."""
        with self._one_at_a_time:
            return self._open(account, users)

    def _open(self, account: str, users: list[int]) -> tuple[Path, int, list[int]]:
        if not re.fullmatch(r"[\w-]+", account):
            raise VmmError(f"account {account!r} has no layer store")
        place = self._directory / account
        store, disk = place / "store", place / "store.ext4"
        if store.exists() and not self._is_of_the_share(store, disk):
            self._set_aside(account)
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
            if self._share:
                _make_disk(disk, self._share, first)
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
        return disk if self._share else store, store.stat().st_uid, wanted

    def _is_of_the_share(self, store: Path, disk: Path) -> bool:
        """False where the settings were others, or a service of before kept its layers in a directory."""
        if not self._share:
            return not disk.exists()
        with contextlib.suppress(FileNotFoundError):
            return disk.stat().st_size == self._share
        return False

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

    def drop_unused(self, days: float, is_used: Callable[[str], bool]) -> None:
        """Removes what no build has used for so long. `is_used` says whether an account builds, when its store is about to go: whoever
        called may have waited for a thread since, and builds begin meanwhile."""
        self._drop_older(days * 86400, is_used)
        self.sweep()

    def give_up(self, is_used: Callable[[str], bool]) -> bool:
        """Removes the store that was used longest ago, since its room is wanted. Returns False where there is none."""
        found = self._drop_older(_RECENT_SECONDS, is_used, most=1)
        self.sweep()
        return found > 0

    def _drop_older(self, seconds: float, is_used: Callable[[str], bool], most: int = 1 << 30) -> int:
        ages: list[tuple[float, str]] = []
        for place in self._directory.glob("*"):
            if not place.name.startswith(DROPPED):
                with contextlib.suppress(OSError):
                    ages.append(((place / "users").stat().st_mtime, place.name))
        dropped = 0
        for _, account in sorted(ages):
            with contextlib.suppress(OSError), self._one_at_a_time:  # no build may begin in it meanwhile
                is_old = (self._directory / account / "users").stat().st_mtime < time.time() - seconds
                if dropped < most and is_old and not is_used(account):
                    self._set_aside(account)
                    dropped += 1
        return dropped

    def _users(self, place: Path) -> list[int]:
        with contextlib.suppress(OSError, ValueError):
            return [user for user in map(int, (place / "users").read_text(encoding="ascii").split()) if user >= _WHOLE]
        return []


def _make_disk(disk: Path, share: int, owner: int) -> None:
    """Makes the file system, in which nothing is written that is not used. Raises OSError with the program's words."""
    with disk.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(share)
    command = [
        "mkfs.ext4", "-q", "-F", "-m", "0", "-e", "remount-ro", "-J", "size=32", "-i", str(_INODE_BYTES),
        "-E", f"lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner={owner}:{owner}", str(disk),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_MAKE_SECONDS)
    if done.returncode:
        raise OSError(f"no file system for an account's layers: {done.stderr.strip()}")


def remove_dropped(directory: Path) -> None:
    for path in directory.glob(f"{DROPPED}*"):
        shutil.rmtree(path, ignore_errors=True)


def id_maps(option: str, first: int, single: list[int]) -> str:
    """Returns arguments of unshare(1): an image's ids up to a million and some, then each of the single ones."""
    maps = [f"--{option}=0:{first}:{_WHOLE}", *(f"--{option}={user}:{first + _WHOLE + number}:1" for number, user in enumerate(single))]
    return " ".join(maps)
