"""A real instance whose clock and whose vmm's system calls a test has in hand (inside.py), and the application that counts."""

from __future__ import annotations

import errno
import mmap
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import inside
from service import REPO, Instance
from wire import get

from vmm.qemu.machine import BINARY

POLICY = {"maxIdleDurationSeconds": 28_800, "suspendedDurationSeconds": 28_800, "autoResumeEnabled": True}
_SITE = Path(sysconfig.get_path("stdlib")) / "sitecustomize.py"  # Debian's interpreters have one
_DOCKERFILE = 'FROM public.ecr.aws/lambda/microvms:al2023-minimal\nCOPY --chmod=755 ledger /ledger.bin\nEXPOSE 8080\nCMD ["/ledger.bin"]\n'


class Hand:
    """The file that a service has inside."""

    def __init__(self, one: Instance) -> None:
        self._instance = one
        self._mounts: subprocess.Popen[bytes] | None = None  # a process in the service's mount namespace, for as long as that is needed
        self._qemu = Path(BINARY)
        where, self._code = one.directory / "hand", one.directory / "sitecustomize.py"
        where.write_bytes(bytes(inside.SIZE))
        with where.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), inside.SIZE)
        source = Path(inside.__file__).read_text()
        self._code.write_text(f"WHERE = {str(where)!r}\n{source}")
        one.environment["PYTHONDONTWRITEBYTECODE"] = "1"  # what is compiled of it would lie in the host's own cache

    def start(self, qemu: Path = Path(BINARY)) -> None:
        """Starts the service, with another QEMU in the place of the host's. Mounts of an earlier start's microVMs are still there."""
        if self._mounts is None:
            bind = f'mount --bind "$0" {_SITE.resolve()} && echo && exec cat'
            self._mounts = subprocess.Popen(
                ["unshare", "-m", "sh", "-c", bind, str(self._code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert self._mounts.stdout is not None and self._mounts.stdout.readline(), "no mounts"
        enter = ("nsenter", f"--mount=/proc/{self._mounts.pid}/ns/mnt", "--")
        if qemu != self._qemu:
            command = ["umount", BINARY] if qemu == Path(BINARY) else ["mount", "--bind", str(qemu), BINARY]
            subprocess.run([*enter, *command], check=True)
            self._qemu = qemu
        self._instance.start(enter)

    def close(self) -> None:
        """Once the service has stopped."""
        if self._mounts is not None:
            self._mounts.communicate()

    def set_clock(self, ahead: float) -> None:
        inside.CLOCK.pack_into(self._shared, 0, ahead)

    def arm(self, nth: int = -1, error: str = "EIO") -> None:
        """Counts vmm's calls from now on; the `nth` fails."""
        self._shared[inside.STRUCK_AT : inside.STRUCK_AT + inside.STRUCK_BYTES] = bytes(inside.STRUCK_BYTES)
        inside.PLAN.pack_into(self._shared, inside.PLAN_AT, self._instance.pid_of("vmm"), nth, getattr(errno, error), 0)

    def disarm(self) -> int:
        """How many calls were made since."""
        count = int(inside.PLAN.unpack_from(self._shared, inside.PLAN_AT)[3])
        inside.PLAN.pack_into(self._shared, inside.PLAN_AT, 0, -1, 0, 0)
        return count

    @property
    def struck(self) -> str:
        """The call that has failed."""
        return self._shared[inside.STRUCK_AT : inside.STRUCK_AT + inside.STRUCK_BYTES].rstrip(b"\0").decode(errors="replace")


def ledger_image(one: Instance) -> str:
    """Its guest is the smallest, and its application counts requests in memory and on its disk."""
    program = one.directory / "ledger"
    subprocess.run(["musl-gcc", "-static", "-Os", "-s", "-o", program, REPO / "tests/guests/ledger.c"], check=True)
    arn = one.create("ledger", one.upload({"Dockerfile": _DOCKERFILE, "ledger": program.read_bytes()}))
    build = one.built(arn)
    assert build["buildState"] == "SUCCESSFUL", build
    return arn


def asked(one: Instance, vm: dict[str, Any], timeout: float = 40.0) -> tuple[int, tuple[int, int]]:
    """The status of one request, and what is in the ledger: in memory, and on the disk. Raises OSError and EOFError where there is none."""
    answer = get(vm["endpoint"], one.root / "tls/ca.crt", vm["token"], timeout=timeout)
    found = re.fullmatch(rb"(\d+) (-?\d+)", answer.body)
    return answer.status, (int(found[1]), int(found[2])) if answer.status == 200 and found else (0, 0)
