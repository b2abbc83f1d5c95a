"""The daemon, served: its calls (vmm/rpc/) behind one socket."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable
from typing import Any

import structlog

from gateway import executors
from gateway.config import Settings
from gateway.peers import EDGE_ASKS_VMM
from gateway.rpc import Handler, Server, Service

from . import probe, sealing, upgrades
from .cgroups import Cgroups
from .daemon import Vmm
from .errors import VmmError, of_the_host

log = structlog.get_logger()

_FIRST_SECONDS = 3600.0  # of the one start that reads all that is stored


def service(calls: Iterable[object]) -> Service:
    """What vmm offers; an OSError that a call raises has a kind and says what to do, as all else that goes wrong."""
    made = Service(*calls)
    made.methods = {name: (_explaining(handler), kind, has_descriptors) for name, (handler, kind, has_descriptors) in made.methods.items()}
    return made


def _explaining(handler: Handler) -> Handler:
    async def call(*arguments: Any) -> Any:
        try:
            return await handler(*arguments)
        except OSError as error:
            raise of_the_host(error) from error

    return call


def listen(settings: Settings, calls: Iterable[object]) -> Server:
    """Serves control, and edges what is theirs to call."""
    offered, users = service(calls), settings.users
    return Server(settings.vmm_socket, offered, {0, users.control, users.edge}, {users.edge: offered.only(EDGE_ASKS_VMM)})


async def serve(settings: Settings, ready: Callable[[], object]) -> None:
    """Runs until SIGTERM. `ready` is called once the socket answers."""
    cgroups = Cgroups(settings.name, settings.root)
    info = await executors.LATENCY.run(probe.host_info, settings)
    await executors.BULK.run(sealing.prepare, settings, lambda text: log.error("manifest.not_sealed", text=text), seconds=_FIRST_SECONDS)
    try:
        await executors.BULK.run(upgrades.tidy, settings, lambda text: log.info("hypervisor.root_removed", text=text))
    except (OSError, VmmError) as error:  # nothing was removed, and who needs a root has it
        log.warning("hypervisor.roots_not_looked_at", error=str(error))
    vmm = Vmm(settings, info, cgroups)
    await vmm.start()
    server = listen(settings, vmm.calls)
    server.on_connect = vmm.connected
    log.info("vmm.ready", hypervisor=info.hypervisor, accelerator=info.accelerator, note=info.accelerator_note)
    ready()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    server.close()
    await vmm.close()
