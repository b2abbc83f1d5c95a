"""The daemon put together and served: its own calls, and those about images and archives, behind one socket."""

from __future__ import annotations

import asyncio
import signal

import structlog

from gateway import executors
from gateway.config import Settings
from gateway.rpc import Server, Service

from . import probe
from .archive_calls import ArchiveCalls
from .cgroups import Cgroups
from .daemon import Vmm
from .image_calls import ImageCalls

log = structlog.get_logger()


async def serve(settings: Settings, ready: object) -> None:
    """Runs until SIGTERM. `ready` is called once the socket answers."""
    cgroups = Cgroups(settings.name, settings.root)
    info = await executors.LATENCY.run(probe.host_info, settings, cgroups)
    vmm = Vmm(settings, info, cgroups)
    await vmm.start()
    server = Server(settings.vmm_socket, Service(vmm, ImageCalls(vmm), ArchiveCalls(vmm)), {0, settings.users.control, settings.users.edge})
    server.on_connect = vmm.connected
    log.info("vmm.ready", hypervisor=info.hypervisor, accelerator=info.accelerator, note=info.accelerator_note)
    ready()  # type: ignore[operator]
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    server.close()
    await vmm.close()
