"""`python -m gateway.edge SLOT`: one edge worker."""

from __future__ import annotations

import os
import sys

from gateway import process
from gateway.config import Settings

from . import worker


async def main(settings: Settings) -> None:
    context = worker.server_context(settings.tls_dir / "edge.crt", settings.tls_dir / "edge.key")
    sockets = process.inherited()["edge"]
    await worker.run(
        f"edge-{sys.argv[1]}-{os.getpid()}", settings.edge, settings.control_socket, settings.vmm_socket, sockets, context, process.ready
    )


process.run(f"edge-{sys.argv[1]}", main)
