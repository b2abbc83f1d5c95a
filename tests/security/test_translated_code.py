"""The wall between a fault of the emulator's and code of a guest's in it: no memory is to be written and executed at once.

Taken away by name: `split-wx=on`.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from vmm.qemu import machine as topology


@pytest.mark.parametrize("without", [False, True])
def test_no_mapping_of_an_emulating_hypervisor_is_both(without: bool) -> None:
    command = topology._bare("tcg", topology.processor("tcg"), "q35", 64, 1, "memory-backend-ram")
    at = command.index("-accel") + 1
    assert topology.TRANSLATED in command[at].split(",")
    if without:
        command[at] = command[at].replace(f",{topology.TRANSLATED}", "")
    ask = '{"execute": "qmp_capabilities"}\n'
    with subprocess.Popen([*command, "-S", "-qmp", "stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(ask)
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while '"return"' not in process.stdout.readline():  # the machine is made then
            assert time.monotonic() < deadline
        maps = [line.split() for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()]
        process.kill()
    assert any(words[1].startswith("r-x") for words in maps)
    assert bool([words for words in maps if words[1].startswith("rwx")]) == without
    assert without or {words[1] for words in maps if "tcg-jit" in " ".join(words)} >= {"rw-s", "r-xs"}
