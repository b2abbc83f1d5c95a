"""vmm's calls about images: builds, the first boot, the seal, the end. Made of the daemon's parts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from gateway import executors
from gateway import messages as m
from gateway.rpc import Connection, Reply

from . import disks, sandboxes
from .daemon import Vmm
from .driver import Machine
from .errors import explained


class ImageCalls:
    def __init__(self, vmm: Vmm) -> None:
        self._vmm = vmm
        self._directory = vmm.settings.images_dir

    async def rpc_build(self, connection: Connection, body: m.BuildRequest) -> Reply:
        """Answers at once, with the log and the phases to read."""
        return Reply(None, list(await self._vmm.builder.begin(body, self._making(body.image))))

    async def rpc_build_result(self, connection: Connection, body: m.BuildName) -> m.BuildResult:
        return await self._vmm.builder.result(body.build)

    async def rpc_build_cancel(self, connection: Connection, body: m.BuildName) -> None:
        await self._vmm.builder.cancel(body.build)

    async def rpc_boot(self, connection: Connection, body: m.BootRequest) -> Reply:
        """BootSnapshotCache an image's machine; the descriptor is the agent's channel."""
        with self._vmm.preparing(body.session):
            machine = await self._boot(body)
        return Reply(None, [await machine.agent()])

    async def _boot(self, body: m.BootRequest) -> Machine:
        image = self._making(body.image)
        link = await self._vmm.network.take()
        console = os.open(image / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            if body.egress is not None:
                await self._vmm.network.enable_egress(link, body.egress)
            machine = await self._vmm.driver.boot(image, body.shape, link, console)
        except BaseException:
            await self._vmm.network.release(link)
            raise
        finally:
            os.close(console)
        machine.record.session = body.session
        machine.save_record()
        self._vmm.hold(body.session, machine, link)
        return machine

    async def rpc_give_disk(self, connection: Connection, body: m.BootedRequest) -> None:
        await self._vmm.driver.give_disk(self._vmm.held(body.session, 0).machine, self._making(body.image))

    async def rpc_seal(self, connection: Connection, body: m.BootedRequest) -> m.Sealed:
        """Stores the booted machine as the image; it exists from the moment of one rename."""
        held = self._vmm.held(body.session, 0)
        making, target = self._making(body.image), self._directory / body.image
        held.expected = True
        sealed = await self._vmm.driver.seal(held.machine, making)
        await self._vmm.let_go(body.session, held)
        sandboxes.cut(making / "console.log")
        making.rename(target)
        disks.sync_path(target.parent)
        self._vmm.standbys.want(target)
        return sealed

    async def rpc_image_delete(self, connection: Connection, body: m.ImageName) -> None:
        """What is gone already is no error; what cannot be removed is one, and may be asked for again."""
        image = self._directory / body.image
        await self._vmm.standbys.forget(image)
        for path in (image, self._making(body.image)):
            try:
                await executors.BULK.run(_remove, path)
            except OSError as error:
                raise explained(error, f"image {body.image} could not be removed: {error}") from error

    def _making(self, image: str) -> Path:
        return self._directory / f".{image}"


def _remove(path: Path) -> None:
    """Raises OSError."""

    def failed(work: object, name: str, error: tuple[type[BaseException], BaseException, object]) -> None:
        if not isinstance(error[1], FileNotFoundError):
            raise error[1]

    shutil.rmtree(path, onerror=failed)
