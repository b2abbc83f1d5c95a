"""What a guest's kernel says of a process that it killed for want of memory, as a line of the microVM's log."""

from __future__ import annotations

import re

# As mm/oom_kill.c writes it; a control group is one that the guest has made by itself.
_RECORD = re.compile(r"(Memory cgroup o|O)ut of memory: Killed process \d+ \((.*)\) total-vm:(.*)")
_RESIDENT = re.compile(r"-rss:(\d+)kB")


def line_of(record: bytes) -> str:
    """The process's name is the guest's word, and so is all the rest."""
    found = _RECORD.match(record.decode(errors="replace"))
    if found is None:
        return "out of memory: the guest's kernel killed a process"
    what = "out of memory" if found[1] == "O" else "a control group inside the guest is out of memory"
    held = sum(int(kib) for kib in _RESIDENT.findall(found[3])) >> 10
    return f"{what}: the guest's kernel killed {found[2]}, which held {held} MiB"
