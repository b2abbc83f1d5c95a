"""Calls about images: builds, the first boot, the seal, the end."""

from __future__ import annotations

import asyncio
import os

from gateway import executors
from gateway import messages as m
from gateway.rpc import Connection, Reply

from .. import beneath
from ..builds import Builder
from ..driver import Driver, Machine
from ..errors import explained
from ..images import Images
from ..network import Network
from ..standbys import Standbys
from ..vms import VmRegistry


class ImageCalls:
    def __init__(
        self, images: Images, driver: Driver, network: Network, standbys: Standbys, builder: Builder, vms: VmRegistry,
    ) -> None:  # fmt: skip
        self._images, self._driver, self._network = images, driver, network
        self._standbys, self._builder, self._vms = standbys, builder, vms

    async def rpc_build(self, connection: Connection, body: m.BuildRequest, descriptors: list[int]) -> Reply:
        """Answers at once, with the log and the phases to read."""
        try:
            beneath.given(descriptors, 2, os.O_RDONLY)
            made = self._images.making(body.image)
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return Reply(None, list(await self._builder.begin(body, made, *descriptors)))

    async def rpc_build_result(self, connection: Connection, body: m.BuildName) -> m.BuildResult:
        return await self._builder.result(body.build)

    async def rpc_build_cancel(self, connection: Connection, body: m.BuildName) -> None:
        await self._builder.cancel(body.build)

    async def rpc_boot(self, connection: Connection, body: m.BootRequest) -> Reply:
        """Boots an image's machine; the descriptor is the agent's channel."""
        async with self._vms.owned(body.session, "being booted"):
            with self._vms.preparing(body.session):
                machine = await self._boot(body)
            return Reply(None, [await machine.agent()])

    async def _boot(self, body: m.BootRequest) -> Machine:
        """Whatever it raises, neither link nor hypervisor is left."""
        making = self._images.making(body.image)
        link = await self._network.take()
        machine: Machine | None = None
        try:
            console = os.open(making / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                if body.egress is not None:
                    await self._network.enable_egress(link, body.egress)
                machine = await self._driver.boot(making, body.shape, link, console)
            finally:
                os.close(console)
            machine.record.session = body.session
            machine.save_record()
        except BaseException:
            try:
                if machine is not None:
                    await asyncio.shield(machine.kill())
            finally:
                await self._network.release(link)
            raise
        self._vms.add(body.session, machine, link)
        return machine

    async def rpc_give_disk(self, connection: Connection, body: m.BootedRequest) -> None:
        async with self._vms.owned(body.session, "being given its disk"):
            await self._driver.give_disk(self._vms.require(body.session, 0).machine, self._images.making(body.image))

    async def rpc_seal(self, connection: Connection, body: m.SealRequest) -> m.Sealed:
        """Stores the booted machine as the image; it exists from the moment of one rename."""
        async with self._vms.owned(body.session, "being sealed"):
            entry = self._vms.require(body.session, 0)
            entry.is_end_expected = True
            sealed = await self._driver.seal(entry.machine, self._images.making(body.image), body.account)
            released = self._vms.remove(entry)
        await released
        self._standbys.want(await executors.LATENCY.run(self._images.publish, body.image))
        return sealed

    async def rpc_image_delete(self, connection: Connection, body: m.ImageName) -> None:
        """What is gone already is no error; what cannot be removed is one, and may be asked for again."""
        await self._standbys.forget(self._images.path(body.image))
        try:
            await executors.BULK.run(self._images.remove, body.image)
        except OSError as error:
            raise explained(error, f"image {body.image} could not be removed: {error}") from error
