"""Network namespaces of the tests' own: without a name in /run/netns and without a mount, so that none outlives the process that made it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vmm import syscalls
from vmm.namespaces import inside


class Namespace:
    """A network namespace with a loopback device that is up. It ends with this object's descriptor and with what was made inside."""

    def __init__(self) -> None:
        made: list[int] = []

        def work() -> None:
            syscalls.unshare(syscalls.CLONE_NEWNET)
            made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        self._descriptor = made[0]
        self.ip("link", "set", "lo", "up")

    @property
    def path(self) -> str:
        """Other processes of root's can open it, for as long as this one lives (proc_pid_fd(5))."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def enter(self, *command: str) -> list[str]:
        """`command`, to be run in this namespace."""
        return ["nsenter", f"--net={self.path}", *command]

    def ip(self, *words: str) -> str:
        return subprocess.run(self.enter("ip", *words), check=True, capture_output=True, text=True, timeout=20).stdout

    def inside(self, work: Callable[[], Any]) -> Any:
        return inside(Path(self.path), work)

    def close(self) -> None:
        os.close(self._descriptor)


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    one = Namespace()
    try:
        yield one
    finally:
        one.close()
