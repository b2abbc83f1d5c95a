"""The wall around the process that reads an artifact: it has control's user, and nothing of what control has.

A stand-in, with that user, tries what somebody would who had taken it over by a fault of zlib's. Taken away by name: each of the two
layers (gateway/confine.py), and both.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway import confine
from gateway import messages as m
from gateway.config import Settings
from gateway.images import artifact
from gateway.images.pipeline import Pipeline
from gateway.sessions.host import Host

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="control has a user of its own")
UID = 640_001
ATTACK = Path(__file__).with_name("attack.py")
PYTHON = "/usr/bin/python3"  # which every user may start, as not a checkout below a home that is closed
FILES = {
    "read a key",
    "list the folder",
    "write a key",
    "make a file",
    "rename out",
    "link out",
    "lay a link",
    "read the host",
    "read control's memory",
}
CALLS = {"connect to vmm", "connect to the API", "signal control", "start a program"}


@pytest.fixture
def control(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """Control's folder, its socket to vmm, its API, and itself: a process of its user, of whom the attacker is a child."""
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == 0 and str(parent) != "/":
            parent.chmod(parent.stat().st_mode | 0o011)
    folder, work = tmp_path / "control", tmp_path / "control/builds/b/context"
    work.mkdir(parents=True)
    (folder / "keys.json").write_text("secret")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, UID, UID)
        path.chmod(0o700 if path.is_dir() else 0o600)
    with socket.socket(socket.AF_UNIX) as vmm, socket.socket() as api:
        vmm.bind(str(tmp_path / "vmm.sock"))
        os.chmod(tmp_path / "vmm.sock", 0o666)
        vmm.listen()
        api.bind(("127.0.0.1", 0))
        api.listen()
        code = tmp_path / "code"
        (code / "gateway").mkdir(parents=True)
        shutil.copy(ATTACK, code)
        shutil.copy(confine.__file__, code / "gateway")
        for path in (code, *code.rglob("*")):
            path.chmod(0o755)
        yield SimpleNamespace(folder=folder, work=work, socket=tmp_path / "vmm.sock", port=api.getsockname()[1], code=code)


def attacked(control: SimpleNamespace, layers: str) -> set[str]:
    words = [str(control.code / ATTACK.name), layers, str(control.folder), str(control.work), str(control.socket), str(control.port)]
    command = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--no-new-privs", "--", PYTHON, "-c"]
    parent = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(control.code), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*command, parent, *words], capture_output=True, text=True, timeout=60, check=False, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_nothing_of_controls_is_the_unpackers(control: SimpleNamespace) -> None:
    assert attacked(control, "landlock,filter") == {"its own work"}


def test_without_the_walls_all_of_it_is(control: SimpleNamespace) -> None:
    assert attacked(control, "") == {*FILES, *CALLS, "its own work"}


def test_each_layer_by_itself_keeps_its_own(control: SimpleNamespace) -> None:
    assert attacked(control, "filter") >= {"read a key", "its own work"} and not attacked(control, "filter") & CALLS
    by_landlock = attacked(control, "landlock")
    assert not by_landlock & FILES and by_landlock >= {"connect to vmm", "its own work"}


async def test_control_follows_no_link_that_it_finds(tmp_path: Path) -> None:
    """The second layer: what the process left is opened as itself, or not at all."""
    (tmp_path / "keys.json").write_text("FROM secret\n")
    (tmp_path / "Dockerfile").symlink_to(tmp_path / "keys.json")
    pipeline = Pipeline(Settings(root=tmp_path), None, None, lambda job: None, None)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="symbolic link"):
        pipeline._prepare(tmp_path / "Dockerfile", "amd64")
    (tmp_path / "plain").write_text("FROM secret\n")
    assert "secret" in pipeline._prepare(tmp_path / "plain", "amd64").text
    request = m.BuildRequest("b", "image", "1", [], 1, {})
    with pytest.raises(OSError, match="symbolic link"):
        await Host(None, tmp_path).build(request, tmp_path / "plain", tmp_path / "Dockerfile")  # type: ignore[arg-type]


async def test_one_that_was_taken_over_cannot_fill_controls_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its output, on either pipe, or by the file that control reads itself."""
    start, processes = asyncio.create_subprocess_exec, []

    async def flood(*words: Any, **named: Any) -> Any:
        processes.append(await start("sh", "-c", f"exec yes '{{' >&{1 + len(processes)}", **named))
        return processes[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", flood)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        async with asyncio.timeout(30):
            with pytest.raises(artifact.BuildFailed, match="could not be unpacked"):
                await artifact.unpack(Settings(root=tmp_path), tmp_path / "a.zip", tmp_path / "context")
    assert [process.returncode for process in processes] == [-9, -9]
    (tmp_path / "Dockerfile").write_bytes(b"FROM x\n")
    os.truncate(tmp_path / "Dockerfile", 1 << 34)
    pipeline = Pipeline(Settings(root=tmp_path), None, None, lambda job: None, None)  # type: ignore[arg-type]
    with pytest.raises(artifact.BuildFailed, match="ARCHIVE_INVALID: the Dockerfile has more than 1048576 bytes"):
        pipeline._prepare(tmp_path / "Dockerfile", "amd64")
    os.truncate(tmp_path / "Dockerfile", 7)
    pipeline._prepare(tmp_path / "Dockerfile", "amd64")  # positive control: of that length it is read
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 << 10, "KiB"


def test_the_filter_refuses_by_number_on_each_machine() -> None:
    for machine in ("x86_64", "aarch64"):
        code = confine.program(machine)
        lines = [code[at : at + 8] for at in range(0, len(code), 8)]
        assert len(lines) < 256, "jumps are a byte"
        for at, line in enumerate(lines[6:-2], 6):
            assert at + 1 + line[2] == len(lines) - 1, "each leads to the refusal"
    assert platform.machine() in ("x86_64", "aarch64")


def zipped(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("Dockerfile", "FROM x\n")
        archive.writestr("caf\u00e9/app.py", "print()\n" * 1000)
    return path


async def test_an_artifact_is_unpacked_within_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real process, its walls and its environment: none of control's credentials is in it."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    seen: list[dict[str, Any]] = []
    start = asyncio.create_subprocess_exec

    async def noted(*words: Any, **named: Any) -> Any:
        seen.append(named["env"])
        return await start(*words, **named)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)
    await artifact.unpack(Settings(root=tmp_path), zipped(tmp_path / "a.zip"), tmp_path / "context")
    assert sorted(path.name for path in (tmp_path / "context").iterdir()) == ["Dockerfile", "context.tar"]
    assert seen and "AWS_SECRET_ACCESS_KEY" not in seen[0]
