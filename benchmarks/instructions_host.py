"""One tree's edge worker under callgrind, for `instructions.py`: TREE WORK ORIGIN_PORT. Serves until its standard input ends.

It runs with the tree's own Python and imports everything from the tree, so that each side's worker meets its own side's control.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

TREE, WORK = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
sys.path[:0] = [str(TREE), str(TREE / "tests/unit"), str(TREE / "benchmarks")]

from edge_rig import Control, Vmm  # noqa: E402
from peers import free_port  # noqa: E402

from gateway.config import Settings  # noqa: E402
from gateway.edge import native  # noqa: E402
from gateway.instance import make_certificates  # noqa: E402
from gateway.rpc import Server, Service  # noqa: E402
from gateway.tokens import Minter  # noqa: E402


async def main() -> None:
    if not native.directory().is_dir():
        sys.exit(f"{TREE}: the edge is not compiled: run make compiled there")
    settings = Settings(root=WORK)
    settings.tls_dir.mkdir()
    make_certificates(settings)
    minter = Minter(WORK / "keys")
    users = {os.getuid()}
    servers = [Server(WORK / "c", Service(Control(minter)), users), Server(WORK / "v", Service(Vmm()), users)]
    port, certificate = free_port(), settings.tls_dir / "edge.crt"
    command = [
        "valgrind", "--tool=callgrind", "--collect-systime=no", f"--callgrind-out-file={WORK}/count", f"--vgdb-prefix={WORK}/vgdb",
        sys.executable, TREE / "benchmarks/edge_worker.py", port, certificate, settings.tls_dir / "edge.key", WORK / "c", WORK / "v",
    ]  # fmt: skip
    with (WORK / "worker.log").open("wb") as log:
        # Dictionaries and sets iterate alike in each run.
        worker = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env={**os.environ, "PYTHONHASHSEED": "0"})
    token = minter.mint("s1", [(1, 65535)], 86400)
    print(json.dumps({"port": port, "token": token, "pid": worker.pid}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    worker.kill()
    worker.wait()
    for server in servers:
        server.close()


asyncio.run(main())
