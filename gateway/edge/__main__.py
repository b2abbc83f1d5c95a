"""`python -m gateway.edge SLOT`: one edge worker."""

from __future__ import annotations

import os
import sys

from gateway import process
from gateway.config import Settings

from . import worker
from .certificates import Certificates


async def main(settings: Settings) -> None:
    name = f"edge-{sys.argv[1]}-{os.getpid()}"
    sockets, certificates = process.inherited(), Certificates(settings.tls_dir)
    await worker.run(
        name, settings.edge, settings.control_socket, settings.vmm_socket, sockets, certificates, process.ready, settings.traces.endpoint
    )


process.run(f"edge-{sys.argv[1]}", main)
