"""The wall around keys: each is whole, its owner's alone, and on the disk before it is used, or the service does not start with it.

The attacks are a file that a power cut or a full disk has left empty, or that others may read. Taken away by name: the look at a key's
length (tokens._whole).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway import files, instance, tokens
from gateway.config import ConfigError, Settings
from gateway.tokens import Checker, Minter


@pytest.mark.parametrize("content", [b"", b"\0" * 31, b"\0" * 33])
def test_an_empty_secret_signs_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigError, match="a key has 32"):
        files.secret(tmp_path / "key", "x")


def test_a_secret_is_its_owners_alone(tmp_path: Path) -> None:
    made = files.secret(tmp_path / "key", "x")
    (tmp_path / "key").chmod(0o644)
    assert files.secret(tmp_path / "key", "x") == made and (tmp_path / "key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("field", ["encryption_key", "private_key"])
def test_a_key_of_tokens_that_is_cut_short_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    Minter(tmp_path / "keys.json")
    (key,) = msgspec.json.decode((tmp_path / "keys.json").read_bytes())
    (tmp_path / "keys.json").write_bytes(msgspec.json.encode([key | {field: ""}]))
    with pytest.raises(ValueError, match="not 32 each"):
        Minter(tmp_path / "keys.json")
    monkeypatch.setattr(tokens, "_whole", lambda stored: stored)
    assert len(Minter(tmp_path / "keys.json")._keys) == 1, "without the look it was taken"


def stored_by(minter: Minter, path: Path) -> dict[str, Any]:
    """Returns what it stores where there is more to say than its keys."""
    minter.revoke(0.0, "s")
    found = msgspec.json.decode(path.read_bytes())
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("keys", [0, 1, 2])
def test_a_file_without_the_key_that_signs_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: int) -> None:
    path = tmp_path / "keys.json"
    minter = Minter(path)
    minter.rotate()
    stored = stored_by(minter, path)
    path.write_bytes(msgspec.json.encode(stored | {"keys": stored["keys"][:keys], "signing": "another"}))
    with pytest.raises(ValueError, match=f"key another, which is to sign, is not among its {keys} keys"):
        Minter(path)
    if keys:
        monkeypatch.setattr(tokens, "_whole", lambda stored: stored)
        with pytest.raises(StopIteration):
            Minter(path).mint("s", [(1, 2)], 60)


def test_a_first_start_that_was_cut_off_is_gone_on_with(tmp_path: Path) -> None:
    """The key is on the disk, and not yet that it signs."""
    path = tmp_path / "keys.json"
    path.write_bytes(msgspec.json.encode(stored_by(Minter(path), path) | {"signing": ""}))
    again = Minter(path)
    assert Checker(again.verifiers()).verify(again.mint("s", [(1, 2)], 60), time.time()).session == "s"


def test_keys_of_tokens_are_their_owners_alone_and_go_on(tmp_path: Path) -> None:
    token = Minter(tmp_path / "keys.json").mint("s", [(1, 2)], 60)
    (tmp_path / "keys.json").chmod(0o644)
    again = Minter(tmp_path / "keys.json")
    assert (tmp_path / "keys.json").stat().st_mode & 0o777 == 0o600
    assert Checker(again.verifiers()).verify(token, time.time()).session == "s"


@pytest.mark.skipif(os.geteuid() != 0, reason="the file is the edge's")
def test_tickets_that_were_cut_short_are_made_again(tmp_path: Path) -> None:
    """Session tickets under a key of zeros, or none, are anybody's."""
    settings = Settings(root=tmp_path, users={"first": 640_000})  # type: ignore[arg-type]
    settings.tls_dir.mkdir()
    tickets = settings.tls_dir / "tickets.key"
    tickets.touch()
    instance.update_certificates(settings)
    first = tickets.read_bytes()
    assert len(first) == 80 and tickets.stat().st_mode & 0o777 == 0o600
    instance.update_certificates(settings)
    assert tickets.read_bytes() == first, "one that is whole stays"
