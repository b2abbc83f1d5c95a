"""The wall around what lies on the disk: settings with secrets, the store, and images' memory in Firecracker's roots are not everybody's.

Each attack is a process with another user that opens the file; the control is the file under the mode that it had.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway import instance
from gateway.config import ConfigError, Settings
from gateway.sessions.store import Store
from gateway.supervisor import settings_for
from vmm.firecracker.jail import Jail, Programs
from vmm.sandboxes import VmSandbox

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="files belong to others")
NOBODY = 65534


def opens(path: Path, uid: int) -> bool:
    """Whether a process with that user and no group of anybody's can open the file."""
    work = "import os, sys; os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1])); open(sys.argv[2], 'rb').read(1)"
    return subprocess.run([sys.executable, "-c", work, str(uid), str(path)], capture_output=True, check=False).returncode == 0


def enterable(path: Path) -> None:
    """A test's own directory keeps nobody out."""
    for parent in (path, *path.parents):
        if str(parent) not in ("/", "/var", "/tmp"):
            parent.chmod(parent.stat().st_mode | 0o711)


# ---- settings ----

SECRET = '[object_store]\nendpoint = "http://store"\naccess_key = "key"\nsecret_key = "s3cret"\n'


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o602])
def test_secrets_that_others_may_read_keep_the_service_from_starting(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "torpor.toml"
    path.write_text(SECRET)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=r"may be read by others .*object_store\.secret_key in it: chmod 600") as caught:
        instance.check_secrets(path)
    assert "\n" not in str(caught.value) and "s3cret" not in str(caught.value)


def test_settings_without_secrets_are_everybodys_and_with_them_their_owners(tmp_path: Path) -> None:
    path = tmp_path / "torpor.toml"
    instance.check_secrets(path)
    path.write_text('[object_store]\nsecret_key_file = "/etc/torpor/secret"\n[edge]\nworkers = 2\n')
    path.chmod(0o644)
    instance.check_secrets(path)
    path.write_text(SECRET)
    path.chmod(0o600)
    instance.check_secrets(path)


@pytest.mark.parametrize("section", ["object_store", "credentials"])
def test_a_secret_has_a_file_of_its_own(tmp_path: Path, section: str) -> None:
    path = tmp_path / "secret"
    path.write_text("s3cret\n")
    given: dict[str, Any] = {section: {"secret_key_file": str(path)}}
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=rf"{section}\.secret_key_file .* may be read by others"):
        instance.with_secrets(Settings(root=tmp_path, **given))
    path.chmod(0o600)
    filled = instance.with_secrets(Settings(root=tmp_path, **given))
    assert getattr(filled, section).secret_key == "s3cret"
    for child in ("edge-0", "vmm", "store"):
        assert "s3cret" not in settings_for(child, filled).model_dump_json(), child
    assert "s3cret" in settings_for("control", filled).model_dump_json(), "who needs it has it"
    with pytest.raises(ConfigError, match="set one of them"):
        instance.with_secrets(Settings(root=tmp_path, **{section: given[section] | {"secret_key": "other"}}))
    path.write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        instance.with_secrets(Settings(root=tmp_path, **given))


# ---- the store ----


@needs_root
async def test_the_store_is_its_owners_alone(tmp_path: Path) -> None:
    """Keys, environment variables and payloads are in it, and in the files that SQLite makes beside it. One of an older version was 0644."""
    path = tmp_path / "torpor.db"
    enterable(tmp_path)
    sqlite3.connect(path).close()
    path.touch()
    path.chmod(0o644)
    assert opens(path, NOBODY), "the control"
    store = Store(path)
    await store.open()
    await store.commit()
    found = {one.name: stat.S_IMODE(one.stat().st_mode) for one in tmp_path.glob("torpor.db*")}
    assert set(found.values()) == {0o600} and "torpor.db" in found, found
    assert not opens(path, NOBODY)
    await store.close()


# ---- Firecracker's roots ----


@needs_root
@pytest.mark.parametrize("wall", [True, False])
def test_an_images_memory_in_a_root_is_its_process_alone(tmp_path: Path, wall: bool) -> None:
    """The file has one inode in each root, and a mode by which every process may read it: the way there is what is closed."""
    enterable(tmp_path)
    memory = tmp_path / "images"
    memory.mkdir(mode=0o700)
    (memory / "memory.raw").write_bytes(b"secret")
    base, mine, other = tmp_path / "jails", 640_100, 640_101
    jail = Jail(base, Programs(Path("/usr/bin/firecracker"), Path("/usr/bin/jailer")), VmSandbox("vm-1", mine, tmp_path), None)
    jail.make()
    jail.give(memory / "memory.raw", "memory.raw")
    if not wall:
        jail.root.chmod(0o755)
    place = jail.root / "memory.raw"
    assert opens(place, mine), "who runs in it reads it"
    assert (opens(place, other), opens(place, NOBODY)) == (not wall, not wall)
    assert stat.S_IMODE(base.stat().st_mode) == 0o711, "nobody lists what runs"
