"""What a guest's init does with a wake message that comes more than once (vmm/guest/wake.c)."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "vmm/guest"
# Each line: whether a message with that nonce was carried out, then how often the clock was set, the generator stirred, connections reset.
PROGRAM = r"""
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <time.h>
static int clocks, stirred, resets;
#define clock_settime(clock, now) ((void)(now), clocks++, 0)
#define ioctl(...) (stirred++, 0)
#include "wake.c"
void connections_prepare(void) { }
void connections_reset(void) { resets++; }
int main(int count, char **words)
{
    for (int i = 1; i < count; i++) {
        struct wake wake = {.wall_ns = 1000, .nonce = strtoull(words[i], NULL, 0), .reset_tcp = 1};
        int done = wake_up(&wake);
        printf("%d %d %d %d\n", done, clocks, stirred / 2, resets);
    }
    return 0;
}
#include "util.c"
"""


def carried_out(tmp_path: Path, *nonces: int) -> list[str]:
    command = ["gcc", "-Wall", "-Wextra", "-Werror", f"-I{SOURCE}", "-x", "c", "-o", str(tmp_path / "wake"), "-"]
    subprocess.run(command, input=PROGRAM, text=True, check=True, timeout=60)
    words = [str(tmp_path / "wake"), *map(str, nonces)]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()


def test_a_message_is_carried_out_once_however_often_it_comes(tmp_path: Path) -> None:
    assert carried_out(tmp_path, 0, 0, 5, 5, 5, 6, 2**63) == ["1 1 1 1", "0 1 1 1", "1 2 2 2", "0 2 2 2", "0 2 2 2", "1 3 3 3", "1 4 4 4"]
