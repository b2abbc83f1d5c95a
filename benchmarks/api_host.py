"""A host without machines for the API's benchmark: answers what control asks of vmm, and does nothing.

`python benchmarks/api_host.py SOCKET`. SNAPSHOTS: how many suspended sessions it says to have.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import uvloop

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests")]

from hollow import Host  # noqa: E402

from gateway.rpc import Server, Service  # noqa: E402


async def main(path: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    host = Host([f"microvm-{number:08d}" for number in range(int(os.environ.get("SNAPSHOTS", "0")))], namespace="")
    host.released.set()  # sessions start at once
    server = Server(path, Service(host), {os.getuid()})
    print("ready", flush=True)
    await stop.wait()
    server.close()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1])))
