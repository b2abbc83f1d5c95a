"""`python -m gateway.edge SLOT`: one edge worker."""

from __future__ import annotations

import sys

from gateway import process
from gateway.config import Settings

from . import worker
from .client.certificates import Certificates


async def main(settings: Settings) -> None:
    sockets, certificates = process.inherited(), Certificates(settings.tls_dir)
    await worker.run(
        _NAME, settings.edge, settings.control_socket, settings.vmm_socket, sockets, certificates, process.ready, settings.traces.endpoint
    )


_NAME = f"edge-{sys.argv[1]}"  # as its slot is named: its successor's is the same
process.run(_NAME, main, has_threads=False)
