"""The wall around what control gives root to read and write: files that control has opened itself, by descriptor, and no paths.

Taken away by name: the look at each descriptor (vmm/beneath.py, given).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from stand_in import connected, reachable
from vmm_rig import Rig

from gateway import executors
from gateway import messages as m
from gateway.rpc import Connection, RpcError
from vmm import archives, beneath, serving

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the other end is another user's")
DIGEST = "0" * 64


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    one.settings.runtime.mkdir(parents=True)
    yield one
    await one.vmm._tasks.close()


@contextlib.asynccontextmanager
async def control(rig: Rig) -> AsyncIterator[Connection]:
    server = serving.listen(rig.settings, rig.vmm.calls)
    reachable(rig.settings.vmm_socket)
    connection = await connected(rig.settings.vmm_socket, rig.settings.users.control)
    yield connection
    connection.close()
    server.close()


def secret(directory: Path) -> Path:
    """A file that control may name and not read."""
    path = directory / "secret"
    path.write_text("FROM secret\n")
    path.chmod(0o600)
    return path


def test_a_descriptor_that_only_names_a_file_reads_it_where_root_opens_it_again(tmp_path: Path) -> None:
    """The attack as such: O_PATH asks for no right to read (open(2)), and /proc/self/fd gives root's to whoever has it open the file."""
    descriptor = os.open(secret(tmp_path), os.O_PATH)
    assert Path(f"/proc/self/fd/{descriptor}").read_text() == "FROM secret\n"
    with pytest.raises(beneath.Stray, match="not opened"):
        beneath.given([descriptor], 1, os.O_RDONLY)
    os.close(descriptor)


async def test_a_build_takes_no_path_and_no_file_that_control_cannot_read(rig: Rig, tmp_path: Path) -> None:
    asked = m.BuildRequest("b", "image", "123456789012", [], 1 << 20, {})
    async with control(rig) as connection:
        for flags in (os.O_PATH, os.O_WRONLY):
            with pytest.raises(RpcError) as refused:
                await connection.call("build", asked, descriptors=[os.open(secret(tmp_path), flags) for _ in range(2)])
            assert refused.value.kind == "Stray"
        with pytest.raises(RpcError) as refused:
            await connection.call("build", asked, descriptors=[os.open("/dev/zero", os.O_RDONLY) for _ in range(2)])
        assert refused.value.kind == "Stray"
        for count in (0, 1, 3):
            with pytest.raises(RpcError) as refused:
                await connection.call("build", asked, descriptors=[os.memfd_create("x") for _ in range(count)])
            assert refused.value.kind == "Stray"
    assert not {"context", "dockerfile"} & set(m.BuildRequest.__struct_fields__)


async def test_what_is_refused_leaves_no_descriptor(rig: Rig) -> None:
    async with control(rig) as connection:
        await connection.call("host_info")
        before = len(os.listdir("/proc/self/fd"))
        for method, body in (
            ("build", m.BuildRequest("b", "image", "1", [], 1, {})),
            ("unpack", m.UnpackRequest("s", DIGEST)),
            ("pack", m.PackRequest("s", 1)),
        ):
            for _ in range(3):
                with pytest.raises(RpcError):
                    await connection.call(method, body, descriptors=[os.open("/dev/null", os.O_RDWR) for _ in range(5)])
        assert len(os.listdir("/proc/self/fd")) == before


async def test_a_pipe_that_nobody_reads_holds_no_thread(rig: Rig) -> None:
    """Each thread that stands in a pipe is one that no other session gets."""
    reading, writing = os.pipe()
    async with control(rig) as connection:
        with pytest.raises(RpcError) as refused:
            await connection.call("pack", m.PackRequest("s", 1), descriptors=[writing])
        assert refused.value.kind == "Stray"
    os.close(reading)


async def test_without_the_look_a_pipe_holds_a_thread(tmp_path: Path) -> None:
    (tmp_path / "s/snapshot-1").mkdir(parents=True)
    (tmp_path / "s/overlay").write_bytes(os.urandom(1 << 20))
    reading, writing = os.pipe()
    pool = executors.Pool("attacked", 1, 60.0)
    pool.start()
    work = asyncio.create_task(pool.run(archives.pack, tmp_path / "s", tmp_path / "s/snapshot-1", writing))
    done, _ = await asyncio.wait([work], timeout=0.5)
    assert not done, "it stands in write(2)"
    os.close(reading)
    with contextlib.suppress(OSError):
        await work
    os.close(writing)
    pool.close()
