"""docs/applications.md, from the table: `python tests/applications/document.py` writes it; a test holds it to the table."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
DOCUMENT = TESTS.parent / "docs/applications.md"
HEAD = """# Applications: what survives a sleep, and what their clients see

This page is made from the table in tests/applications/ (`python tests/applications/document.py`). Each row is an image as its users write
it, used by its real client, put to sleep (SuspendMicrovm, or the idle policy) and woken by the next thing that its client does; what the row
says is what `make test-long-applications` asserts. Memory, processes, open files and the disk are always as before; rows name what a
client can tell.

## The rules behind the table

- The next request wakes a microVM, and so do the next bytes of a client on a WebSocket or on a gRPC stream that is open in both
  directions: those are parked with the microVM, their pings answered meanwhile, and go on.
- A response that only the server still speaks on (server-sent events, a download, gRPC server streaming) is cut at the suspend, so that its
  client can ask again, which wakes. The application has no part in it: events are not lost where it can go on from `Last-Event-ID`.
- A busy microVM is idle where no request is under way: work that nobody waits for stands still in the sleep and goes on after it.
- Endpoints take HTTP. A TCP server is reached through a WebSocket: see below.
"""
TUNNEL = """
## TCP servers: through a WebSocket

Redis, PostgreSQL, sshd and their likes are reached with `websockify` beside them (`websockify 6380 127.0.0.1:6379` in the image) and a local
port that speaks WebSocket to it. `url` is `wss://ENDPOINT/`, `fields` are those of any request (`X-aws-proxy-auth`, and `X-aws-proxy-port`
for websockify's port). This is what the rows above use:

"""


def document() -> str:
    from applications.table import applications

    lines = [HEAD, "## The table", "", "| application | client | as before after the sleep | what its client sees |", "|---|---|---|---|"]
    lines += [f"| {row.title} | {row.client} | {row.survives} | {row.sees} |" for row in applications()]
    code = (TESTS / "applications/tunnel.py").read_text()
    return "\n".join(lines) + "\n" + TUNNEL + f"```python\n{code}```\n"


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    DOCUMENT.write_text(document())
