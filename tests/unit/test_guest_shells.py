"""Shells inside a guest (vmm/guest/shell.c), in a program whose fork(2) and malloc(3) fail and whose kill(2) only says what it was asked."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "vmm/guest"
PROGRAM = r"""
#define _GNU_SOURCE
#include "app.h"
#include "port.h"
#include "util.h"
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static int fork_fails, malloc_fails;
static pid_t scarce_fork(void) { errno = EAGAIN; return fork_fails ? -1 : 12345; }
static void *scarce_malloc(size_t size) { return malloc_fails ? NULL : (malloc)(size); }
static int told_kill(pid_t pid, int number) { printf("kill %d %d\n", (int)pid, number); return 0; }
#define fork scarce_fork
#define malloc scarce_malloc
#define kill told_kill
#include "shell.c"

pid_t app_pid;
uint32_t app_state = APP_RUNNING;
void app_exec_shell(void) {}
void say(const char *format, ...) { (void)format; }
int port_can_take(size_t length) { (void)length; return 1; }
void port_send(uint8_t type, uint16_t channel, const void *payload, uint32_t length)
{
    (void)length;
    if (type == FRAME_SHELL_EXIT) printf("exit %d %d\n", channel, *(const int32_t *)payload);
}

int main(int count, char **words)
{
    (void)words;
    app_pid = getpid();
    fork_fails = count == 1;
    malloc_fails = count > 1;
    for (uint16_t id = 1; id <= SHELLS_MAX + 1; id++) {
        shell_open(id, 80, 24);
        shell_input(id, (const uint8_t *)"exit\n", 5);
        shell_close(id);
    }
    fork_fails = malloc_fails = 0;
    shell_open(99, 80, 24);
    shell_close(99);
    return 0;
}
"""


@pytest.mark.parametrize("arguments", [[], ["malloc"]], ids=["no process", "no memory"])
def test_a_shell_that_cannot_be_started_ends_alone(tmp_path: Path, arguments: list[str]) -> None:
    """Its number is given back, its viewer is told, and nobody is killed: kill(-1) by PID 1 would end every process of the guest."""
    program = tmp_path / "shells"
    command = ["gcc", "-Wall", "-Wextra", "-Werror", f"-I{SOURCE}", "-x", "c", "-o", str(program), "-"]
    subprocess.run(command, input=PROGRAM, text=True, check=True, timeout=60)
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    refused = [f"exit {number} 126" for number in range(1, 18)]
    assert (done.returncode, done.stdout.splitlines()) == (0, [*refused, "kill 12345 9"])
