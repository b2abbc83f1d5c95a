"""What is done while power.c records it: each scene writes below `root`, and says what may be relied on from then."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from known_keys import KEYS

WORDS = ("one", "two", "three")


def sayer(root: Path) -> Callable[[str], Any]:
    file = os.open(root / "words", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    return lambda word: os.write(file, f"{word}\n".encode())


def store(root: Path) -> None:
    from gateway.sessions import store as storing
    from gateway.sessions.model import Session

    say = sayer(root)
    storing._ROOM_BYTES = 4096

    async def work() -> None:
        one = storing.Store(root / "torpor.db")
        await one.open()
        say("open")
        for word in WORDS:
            one.put_session(Session(word, "host", "arn:aws:lambda:us-east-1:123456789012:microvm-image:a", "1.0", "key", 512, 1.0, 60))
            one.put_client_token(word, "p" * 100, "r")
            await one.commit()
            say(word)
        await one.close()

    asyncio.run(work())


def audit(root: Path) -> None:
    from gateway.observe import audit as auditing

    say = sayer(root)
    auditing._FILE_BYTES = 700
    trail = auditing.AuditTrail(root / "audit", lambda: 0.0)
    for word in WORDS:
        for number in range(2):
            trail.write("RunMicrovm", "1", requestID=f"{word} {number}")
        trail.sync()
        say(word)


def keys(root: Path) -> None:
    from gateway import files
    from gateway.tokens import Minter

    say = sayer(root)
    files.secret(root / "sessions.key", "")
    say("secret")
    now = 0.0
    minter = Minter(root / "keys.json", lambda: now)
    for word in WORDS:
        now += 1e9
        assert minter.make_key_if_due()
        minter.use_newest()
        say(f"{word} {minter.verifiers()[-1].kid}")


class Endpoint:
    """Notes what CloudWatch Logs has taken; nobody there loses power."""

    def __init__(self, say: Callable[[str], Any]) -> None:
        self._say = say
        self.exceptions = self

    ResourceAlreadyExistsException = KeyError

    def create_log_group(self, **arguments: Any) -> None: ...

    def create_log_stream(self, **arguments: Any) -> None: ...

    def put_log_events(self, **arguments: Any) -> None:
        for event in arguments["logEvents"]:
            self._say(event["message"])


def logs(root: Path) -> None:
    from gateway.sessions import logs as logging
    from gateway.sessions.shipping import Shipper

    say = sayer(root)
    logging._SEGMENT_BYTES = 100
    kept = logging.LogStore(root / "logs")
    shipper = Shipper(kept, root / "sent.db", lambda: Endpoint(say))
    for word in WORDS:
        for number in range(2):
            kept.append("1", "g", "s", [f"{word} {number}"])
            kept.flush()
        shipper.ship(("1", "g", "s"))
        kept.append("1", "g", "s", [f"{word} 2"])
        kept.flush()


def archive(root: Path) -> None:
    """What was packed comes back; then its copy elsewhere goes."""
    from vmm import archives, seals

    seals.use(KEYS)
    say = sayer(root)
    with (root / "packed").open("rb") as file:
        archives.unpack(file.fileno(), (root / "digest").read_text(), root / "sessions/microvm-1")
    say("back")


def quarantine(root: Path) -> None:
    from gateway.messages import QuarantineRequest
    from vmm import seals
    from vmm.quarantine import Quarantine

    seals.use(KEYS)
    say = sayer(root)
    one = Quarantine(root / "sessions", root / "quarantine", root / "images")
    one.put(QuarantineRequest("microvm-1", 1, "", "a test"))
    say("set aside")
    one.recover("microvm-1")
    say("recovered")


def _backup(root: Path, name: str) -> None:
    from gateway.backup import backup
    from gateway.config import Settings
    from vmm import seals

    seals.use(KEYS)
    say = sayer(root)
    backup(Settings(root=root / "instance", run=root / "run"), root / name, True, lambda text: None)
    say("made")


def backup(root: Path) -> None:
    _backup(root, "monday")


def backup_tar(root: Path) -> None:
    _backup(root, "monday.tar")


def restore(root: Path) -> None:
    """On a root that has another instance already."""
    from gateway.backup import restore
    from gateway.config import Settings

    say = sayer(root)
    (source,) = root.glob("monday*")
    restore(Settings(root=root / "other", run=root / "run"), source, True)
    say("restored")


def unsynced(root: Path) -> None:
    """A promise that is not kept."""
    say = sayer(root)
    for word in WORDS:
        (root / word).write_text(word)
        say(word)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
