"""One edge worker of ours for bench-edge: the real worker; its control and vmm are the benchmark's, its guest is loopback."""

from __future__ import annotations

import gc
import socket
import sys
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gateway import reach
from gateway.config import Edge
from gateway.edge.client.certificates import Certificates
from gateway.edge.worker import run


def main() -> None:
    port, certificate, _, control, vmm = sys.argv[1:]
    reach.GUEST_ADDRESS = "127.0.0.1"
    listener = socket.create_server(("127.0.0.1", int(port)), backlog=4096)
    sockets = {"edge": [listener]}
    gc.freeze()  # as gateway/process.py does
    gc.set_threshold(50_000, 20, 50)
    uvloop.run(run("edge-0", Edge(), Path(control), Path(vmm), sockets, Certificates(Path(certificate).parent), lambda: None))


if __name__ == "__main__":
    main()
