"""What a guest says of an image that does not start (vmm/guest/start.c)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "vmm/guest"
PROGRAM = r"""
#include "start.c"
#include "util.c"
int main(int count, char **words)
{
    by_shell = count > 2;
    explain_file(words[1], ENOEXEC, 1);
    return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("start") / "start"
    command = ["gcc", "-Wall", "-Wextra", "-Werror", f"-I{SOURCE}", "-x", "c", "-o", str(made), "-"]
    subprocess.run(command, input=PROGRAM, text=True, check=True, timeout=60)
    return made


@pytest.mark.parametrize("by_shell", [False, True])
@pytest.mark.parametrize(
    ("content", "says", "by_shell_says"),
    [
        (b"", "is empty", ""),  # for a shell it is a script that does nothing
        (b"\xef", "is neither a program", ""),
        (b"\xef\xbb\xbf", "is neither a program", ""),
        (b"\xef\xbb\xbf#!/bin/sh\n", "begins with a byte order mark", "begins with a byte order mark"),
        (b"\xef\xbb\xbf#", "is neither a program", ""),
        (b"#!/nosuch/shell\n", "is a script for /nosuch/shell", "is a script for /nosuch/shell"),
        (b"#!/bin/sh\r\n", "has Windows' line ends", "has Windows' line ends"),
        (b"#!", "names no interpreter", "names no interpreter"),
        (b"MZ", "is a program for Windows", "is a program for Windows"),
        (b"\x7fELF", "is cut off: an ELF program of 4 bytes", "is cut off"),
        (b"echo hello\n", "is neither a program (ELF) nor a script", ""),
    ],
)
def test_a_file_that_is_no_program(program: Path, tmp_path: Path, by_shell: bool, content: bytes, says: str, by_shell_says: str) -> None:
    file = tmp_path / "run"
    file.write_bytes(content)
    file.chmod(0o755)
    done = subprocess.run([program, file, *(["sh"] if by_shell else [])], capture_output=True, text=True, timeout=20, check=True)
    expected = by_shell_says if by_shell else says
    assert expected in done.stderr and done.stderr.count("\n") == bool(expected), done.stderr
