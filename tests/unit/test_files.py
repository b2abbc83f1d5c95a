"""Files that are whole or not there, and what a damaged one does to the process that needs it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from test_control import Rig

from gateway import files, instance, listeners
from gateway.config import ConfigError, Settings
from gateway.control import Control
from gateway.process import SETTINGS_VARIABLE, passed

ROOT = Path(__file__).resolve().parents[2]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def stopped(control: Control) -> None:
    control.vmm.close()
    await control.lifecycle.close()
    await control.registry.close()
    control.audit.close()


async def test_controls_keys_are_for_its_owner_only(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    known = rig.settings.control_dir / "pager.key"
    known.write_bytes(b"k" * 32)
    known.chmod(0o644)  # one that was made before
    control = Control(rig.settings)
    control.api()
    assert (mode(rig.settings.control_dir / "sessions.key"), mode(known), known.read_bytes()) == (0o600, 0o600, b"k" * 32)
    await stopped(control)


@pytest.mark.parametrize("content", [b"", b"k" * 31], ids=["empty", "short"])
@pytest.mark.parametrize("name", ["sessions.key", "pager.key"])
async def test_an_empty_or_short_key_is_never_used(tmp_path: Path, name: str, content: bytes) -> None:
    rig = Rig(tmp_path)
    path = rig.settings.control_dir / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} has {len(content)} bytes, a key has 32: restore it"):
        control = Control(rig.settings)
        await stopped(control)
        control.api()
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("keys.json", b""), ("keys.json", b'[{"kid":"\xff"}]'), ("access-keys.json", b""), ("access-keys.json", b"{}"),
        ("access-keys.json", b'{"AKIAEXAMPLE":"\xff"}'),
    ],
)  # fmt: skip
async def test_other_keys_that_cannot_be_read_are_said_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    rig = Rig(tmp_path)
    (rig.settings.control_dir / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}.*restore it from a backup"):
        await stopped(Control(rig.settings))


def test_access_keys_that_were_lost_with_the_power_are_said_in_one_line(tmp_path: Path) -> None:
    settings = Settings(root=tmp_path)
    settings.control_dir.mkdir()
    (settings.control_dir / "access-keys.json").touch()
    with pytest.raises(ConfigError, match=r"access-keys\.json.*restore it from a backup"):
        instance.make_access_keys(settings)


def test_a_process_says_in_one_line_what_keeps_it_from_starting(tmp_path: Path) -> None:
    child = "\n".join((
        "from gateway import process", "from gateway.config import ConfigError",
        "async def main(settings): raise ConfigError('a key is empty: restore it')", "process.run('test', main)",
    ))  # fmt: skip
    with passed(Settings(root=tmp_path)) as number:
        environment = {SETTINGS_VARIABLE: str(number), "PATH": os.environ["PATH"]}
        done = subprocess.run(
            [sys.executable, "-c", child],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            check=False,
            pass_fds=[number],
        )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["error"] == "a key is empty: restore it"


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of fsync(2) and rename(2) is done, in order."""
    done: list[str] = []
    sync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        done.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    return done


def test_an_instances_files_outlive_a_power_cut(tmp_path: Path, order: list[str]) -> None:
    settings = Settings(root=tmp_path)
    settings.control_dir.mkdir()
    made = instance.make_access_keys(settings)
    assert order == ["file", "rename", "directory"]
    path = settings.control_dir / "access-keys.json"
    assert (made, mode(path)) == (json.loads(path.read_bytes()), 0o600)
    assert os.listdir(settings.control_dir) == [path.name]


@pytest.mark.parametrize("name", ["access-keys.json.new", "access-keys.json"])
def test_root_follows_no_link_of_a_directory_that_is_controls(tmp_path: Path, name: str) -> None:
    settings = Settings(root=tmp_path)
    settings.control_dir.mkdir()
    (tmp_path / "of-root").write_text("not to be written")
    link = settings.control_dir / name
    link.symlink_to(tmp_path / ("of-root" if name.endswith(".new") else "not-there"))
    instance.make_access_keys(settings)
    assert (tmp_path / "of-root").read_text() == "not to be written"
    assert not (tmp_path / "not-there").exists()
    assert json.loads((settings.control_dir / "access-keys.json").read_bytes())


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write(path, b"old", 0o600)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write(path, b"new", 0o600)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["file"])


def test_the_edges_port_outlives_a_power_cut(tmp_path: Path, order: list[str]) -> None:
    """Another port after it would be another address of every endpoint."""
    settings = Settings(root=tmp_path)
    port = listeners.choose_edge_port(settings, in_use=True)
    assert order == ["file", "rename", "directory"] and (tmp_path / "edge-port").read_text() == str(port)
