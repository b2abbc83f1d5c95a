"""Mends the programs of a virtual environment whose path has a space in it, which the first line of a script cannot have (execve(2)).

pip writes its own scripts so that they need none, and copies those that packages bring, as awscli does: they get the same first lines.
"""

import sys
from pathlib import Path


def mend(directory: Path) -> None:
    for script in directory.iterdir():
        first, _, rest = script.read_bytes().partition(b"\n")
        if first.startswith(b"#!") and b" " in first and first[2:].startswith(bytes(directory / "python")):
            # A shell runs the second line; to Python the second and third are a string.
            script.write_bytes(b"#!/bin/sh\n'''exec' \"" + first[2:] + b'" "$0" "$@"\n' + b"' '''\n" + rest)


if __name__ == "__main__":
    mend(Path(sys.prefix) / "bin")
