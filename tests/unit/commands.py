"""`torpor` in a process of its own, forked from one that has imported the command line: importing it is most of what a command takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

TORPOR = Path(sys.prefix) / "bin/torpor"
_SECONDS = 30


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with no settings or credentials but `variables`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TORPOR_", "AWS_"))} | variables
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as errors:
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps([words, environment, out.name, errors.name]) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(words, code, Path(out.name).read_text(), Path(errors.name).read_text())


@cache
def _server() -> subprocess.Popen[str]:
    """One for all tests of this process; it ends with its standard input."""
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _serve() -> None:
    """Forks a child for each line, and answers with its exit code; a child that takes too long ends by SIGALRM."""
    import signal

    from gateway.cli import main

    for line in sys.stdin:
        words, environment, out, errors = json.loads(line)
        if not (child := os.fork()):
            signal.alarm(_SECONDS)
            for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, errors, os.O_WRONLY)):
                os.dup2(os.open(path, flags), number)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv = [str(TORPOR), *words]
            main()
            sys.exit()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
