"""Archives under a key: who has the object store reads nothing, and changes nothing that is taken back."""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import config
from gateway.config import Archive, ConfigError
from vmm import archives, diffs, encryption, seals
from vmm.encryption import CHUNK, ArchiveKeys
from vmm.errors import Damaged, Refused, Unavailable

SECRET = b"the guest's password, which compresses not at all: " + os.urandom(64)
ACCOUNT = "123456789012"
INSTANCE = ArchiveKeys(Archive(encryption="instance"))
OF_A_CHUNK = CHUNK + 16


def asleep(directory: Path, name: str = "microvm-1") -> Path:
    session = directory / name
    snapshot = session / "snapshot-3"
    snapshot.mkdir(parents=True)
    (session / "overlay").write_bytes(SECRET + os.urandom(5 * CHUNK))
    for file in ("3.pages", "3.runs", "devices.state"):
        (snapshot / file).write_bytes(os.urandom(5000))
    diffs.write_manifest(snapshot, diffs.Manifest([3], [], 7000, session=name, account=ACCOUNT))
    return session


def packed(session: Path, keys: ArchiveKeys) -> bytes:
    path = session.parent / "archive"
    with path.open("wb") as file:
        archives.pack(session, session / "snapshot-3", file.fileno(), keys=keys)
    return path.read_bytes()


def unpack(data: bytes, directory: Path, keys: ArchiveKeys, name: str = "microvm-1") -> Path:
    """With the checksum that fits: as a control process that was taken over hands it in."""
    target, path = directory / "back" / name, directory / "given"
    target.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    with path.open("rb") as file:
        archives.unpack(file.fileno(), hashlib.sha256(data).hexdigest(), target, keys)
    return target


@pytest.mark.parametrize("keys", [INSTANCE, ArchiveKeys()], ids=["encrypted", "plain"])
def test_who_has_the_object_store_reads_nothing(tmp_path: Path, keys: ArchiveKeys) -> None:
    """The control: what is not encrypted is read."""
    session = asleep(tmp_path)
    data = packed(session, keys)
    assert (SECRET[-64:] in data) is not keys.are_wanted
    assert (unpack(data, tmp_path, keys) / "overlay").read_bytes() == (session / "overlay").read_bytes()


def changed(data: bytes) -> dict[str, bytes]:
    head = data.index(b"\n") + 1
    body = data[head:]
    flipped = bytearray(data)
    flipped[head + CHUNK // 2] ^= 1
    return {
        "a flipped bit": bytes(flipped),
        "its last chunk cut off": data[: head + len(body) // OF_A_CHUNK * OF_A_CHUNK],
        "half a chunk": data[: head + OF_A_CHUNK // 2],
        "nothing but its head": data[:head],
        "two chunks in each other's place": data[:head] + body[OF_A_CHUNK : 2 * OF_A_CHUNK] + body[:OF_A_CHUNK] + body[2 * OF_A_CHUNK :],
        "a chunk left out": data[:head] + body[OF_A_CHUNK:],
        "more behind its end": data + body[:OF_A_CHUNK],
        "another account's": data.replace(ACCOUNT.encode(), b"210987654321", 1),
        "another salt": re.sub(rb'"salt":"..', b'"salt":"00', data, count=1) if b'"salt":"00' not in data else data[:-1],
        "no salt": re.sub(rb'"salt":"[0-9a-f]*"', b'"salt":"zz"', data, count=1),
        "no head": encryption.MAGIC + b"{}\n" + body,
    }


@pytest.mark.parametrize("what", changed(b"\n" + bytes(4 * OF_A_CHUNK)))
def test_what_was_changed_there_is_not_taken(tmp_path: Path, what: str) -> None:
    data = changed(packed(asleep(tmp_path), INSTANCE))[what]
    with pytest.raises(Damaged, match="microvm-1"):
        unpack(data, tmp_path, INSTANCE)
    assert not list((tmp_path / "back").iterdir())


def test_anothers_archive_is_not_taken(tmp_path: Path) -> None:
    data = packed(asleep(tmp_path, "microvm-2"), INSTANCE)
    with pytest.raises(Damaged, match="not what was encrypted"):
        unpack(data, tmp_path, INSTANCE)


def test_without_its_key_it_waits(tmp_path: Path) -> None:
    data, own = packed(asleep(tmp_path), INSTANCE), seals.held()
    seals.use(seals.new())
    try:
        with pytest.raises(Refused, match=r"put the key file of its instance back"):
            unpack(data, tmp_path, INSTANCE)
    finally:
        seals.use(own)
    assert unpack(data, tmp_path, INSTANCE).exists()


def test_the_setting_is_of_what_is_stored_from_now_on(tmp_path: Path) -> None:
    """An archive says how it was stored."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain, sealed = packed(asleep(tmp_path / "a"), ArchiveKeys()), packed(asleep(tmp_path / "b"), INSTANCE)
    assert unpack(plain, tmp_path / "a", INSTANCE).exists()
    assert unpack(sealed, tmp_path / "b", ArchiveKeys()).exists()


def test_no_two_archives_have_one_key(tmp_path: Path) -> None:
    """Nonces begin anew in each: under one key they would give both away (NIST SP 800-38D, 8)."""
    session = asleep(tmp_path)
    first, second = (packed(session, INSTANCE).partition(b"\n")[2] for _ in range(2))
    assert first[:1024] != second[:1024]


@given(st.lists(st.integers(0, 3 * CHUNK), max_size=6), st.integers(1, 2 * CHUNK))
def test_any_writes_are_read_again(sizes: list[int], step: int) -> None:
    class _Memory(io.BytesIO, io.RawIOBase):  # type: ignore[misc]
        pass

    file, plain = _Memory(), b"".join(bytes([number]) * size for number, size in enumerate(sizes))
    with encryption.writing(file, "microvm-1", ACCOUNT, INSTANCE) as sealed:
        for number, size in enumerate(sizes):
            sealed.write(bytes([number]) * size)
    file.seek(0)
    reader = encryption.reading(file, "microvm-1", INSTANCE)
    assert b"".join(iter(lambda: reader.read(step), b"")) == plain


# ---- keys of a command's ----


def command(directory: Path, body: str) -> ArchiveKeys:
    path = directory / "give-key"
    path.write_text(f"#!{sys.executable}\nimport hashlib, sys, time\n{body}\n")
    path.chmod(stat.S_IRWXU)
    return ArchiveKeys(Archive(encryption="command", key_command=[str(path), "vault"]))


GIVES = """
name = sys.argv[3] if len(sys.argv) > 3 else open(sys.path[0] + "/newest").read()
print(name, hashlib.sha256(f"{sys.argv[1:3]} {name}".encode()).hexdigest())
"""


def test_keys_of_a_command_can_change(tmp_path: Path) -> None:
    """What was stored under an older one is read with that."""
    keys = command(tmp_path, GIVES)
    (tmp_path / "newest").write_text("key-1")
    first = packed(asleep(tmp_path / "a"), keys)
    (tmp_path / "newest").write_text("key-2")
    second = packed(asleep(tmp_path / "b"), keys)
    assert b'"key":"key-1"' in first and b'"key":"key-2"' in second
    for name, data in (("a", first), ("b", second)):
        assert unpack(data, tmp_path / name, keys).exists()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("sys.exit('no such account')", "ended with status 1: no such account"), ("", "has not answered with an id and a key"),
        ("print('key-1', 'ab' * 31)", "has not answered"), ("print('a key', 'ab' * 32)", "has not answered"),
        ("time.sleep(600)", "has given no key in"),
    ],
)  # fmt: skip
def test_a_command_without_a_key_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str) -> None:
    monkeypatch.setattr(encryption, "_COMMAND_SECONDS", 1.0 if "sleep" in body else 30.0)
    with pytest.raises(Unavailable, match=said):
        packed(asleep(tmp_path), command(tmp_path, body))
    assert not (tmp_path / "archive").read_bytes()


def test_a_command_that_gives_another_key_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "newest").write_text("key-1")
    data = packed(asleep(tmp_path), command(tmp_path, GIVES))
    with pytest.raises(Unavailable, match="has not answered"):
        unpack(data, tmp_path, command(tmp_path, "print('key-9', 'ab' * 32)"))
    with pytest.raises(Refused, match="key_command, which is not set"):
        unpack(data, tmp_path, INSTANCE)
    with pytest.raises(Unavailable, match="No such file"):
        unpack(data, tmp_path, ArchiveKeys(Archive(encryption="command", key_command=["/nowhere/give-key"])))


@pytest.mark.parametrize(
    ("archive", "said"),
    [({"encryption": "command"}, "set archive.key_command"), ({"key_command": ["give-key"]}, "no absolute path"), ({"encryption": "on"}, "encryption")],
)  # fmt: skip
def test_settings_that_cannot_be_meant(tmp_path: Path, archive: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.load(root=tmp_path, archive=archive)
