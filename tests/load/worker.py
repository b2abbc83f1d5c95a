"""One edge worker on loopback, in a process of its own: TLS, HTTP/1.1 and HTTP/2, compiled where that was made.

It is asked on its standard input, by a line, how it is, and answers with a line of JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gateway import reach
from gateway.config import Edge
from gateway.edge.client.certificates import Certificates
from gateway.edge.worker import Worker
from gateway.observe import log


def condition(worker: Worker) -> dict[str, Any]:
    """What shows that something was not put back: requests that wait, pauses of connections that nobody uses, open descriptors, memory."""
    idle, pools = worker.upstream.idle(), worker.upstream.pools()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return {
        "waiting": sum(worker.routes.account(session).waiting for session in ("s1",)),
        "held": worker.holds.statistics()["requests"],
        "clients": len(worker.clients),
        "idle": len(idle),
        "idle_paused": sum(not one.transport.is_reading() if one.transport is not None else 0 for one in idle),
        "busy": sum(len(pool.open) - len(pool.idle) + sum(len(one.streams) for one in pool.shared) for pool in pools),
        "queued": sum(len(pool.waiters) + len(pool.waiters_for_shared) + pool.connecting for pool in pools),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "shared": sum(len(pool.shared) for pool in pools),
        "stock": worker.upstream.statistics()["stock"],
        "memory_kib": int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]),
    }


async def serve(settings: Edge, directory: Path) -> None:
    worker = Worker("edge-0", settings, directory / "control.sock", directory / "vmm.sock")
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    await worker.serve([listener], Certificates(directory / "tls"))
    questions = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(questions), sys.stdin)
    print(listener.getsockname()[1], flush=True)
    while await questions.readline():
        gc.collect()
        print(json.dumps(condition(worker)), flush=True)


def main() -> None:
    reach.GUEST_ADDRESS = "127.0.0.1"
    settings, directory = sys.argv[1:]
    log.configure("edge-0")  # to standard error
    gc.freeze()  # as gateway/process.py does
    gc.set_threshold(50_000, 20, 50)
    uvloop.run(serve(Edge.model_validate_json(settings), Path(directory)))


if __name__ == "__main__":
    main()
