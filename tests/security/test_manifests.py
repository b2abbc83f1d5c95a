"""Who can write to the data directory, or hands vmm an archive, and has not the instance's keys: what was changed, swapped, taken from another
account or an older moment is refused, and no other session is touched. The controls take the seal's comparison away."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from known_keys import KEYS
from vmm_rig import COUNT_AT, IMAGE, Rig

from gateway import messages as m
from gateway.messages import Shape
from vmm import archives, beneath, diffs, manifest, seals
from vmm.errors import Damaged, Refused, Unavailable, VmmError
from vmm.rpc.sessions import SessionCalls

OURS, OTHERS = "microvm-1", "microvm-2"
ACCOUNT, ANOTHER = "111111111111", "222222222222"


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """Two sessions asleep: ours has counted to 2, the other one to 1."""
    one = Rig(tmp_path, monkeypatch, warm=0)
    manifest.write(one.settings.images_dir / IMAGE, manifest.Manifest(Shape(512, 1, 1 << 30, "kvm", 512), 0, 0, account=ACCOUNT))
    for session in (OURS, OTHERS):
        await one.launch(session)
        await one.sleep(session, 1)
    await one.settled()
    shutil.copytree(place(one, OURS, 1), tmp_path / "older")
    await one.wake(OURS, 2)
    await one.sleep(OURS, 2)
    await one.settled()
    return one


def place(rig: Rig, session: str, incarnation: int) -> Path:
    return rig.settings.sessions_dir / session / f"snapshot-{incarnation}"


def edited(snapshot: Path, account: str = "", **changes: object) -> None:
    """As somebody who has no key can edit it."""
    path = snapshot / diffs.MANIFEST
    known = json.loads(path.read_bytes())
    known["manifest"] |= changes
    known["account"] = account or known["account"]
    path.write_text(json.dumps(known, separators=(",", ":")))


@pytest.fixture
def unsealed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes the comparison of seals away."""
    return lambda: monkeypatch.setattr(seals.hmac, "compare_digest", lambda *_: True)  # type: ignore[attr-defined]


async def wakes(rig: Rig, session: str = OURS, incarnation: int = 3) -> int:
    """Returns what the guest has counted to in its memory when it is loaded."""
    await rig.prepare(m.PrepareRequest(session, incarnation, IMAGE, True))
    entry: Any = rig.vmm.vms.get(session)
    return int(entry.machine.memory[COUNT_AT])


async def refused(rig: Rig, match: str) -> None:
    """Ours is, with one line, and leaves nothing; the other one wakes as if nothing were."""
    with pytest.raises(Damaged, match=match) as said:
        await wakes(rig)
    assert "\n" not in str(said.value) and rig.vmm.vms.get(OURS) is None
    await rig.wake(OTHERS, 2)
    assert rig.counted(OTHERS) == 2


async def test_nobody_attacks(rig: Rig) -> None:
    assert await wakes(rig) == 2
    assert diffs.read_manifest(place(rig, OURS, 2)).account == ACCOUNT


@pytest.mark.parametrize("name", ["2.pages", "2.runs", "devices.state", "1.pages"])
async def test_a_flipped_byte(rig: Rig, name: str) -> None:
    flip(place(rig, OURS, 2) / name)
    await refused(rig, f"{name} is (damaged|no list of runs)")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.unlink()  # and not through the link that an older snapshot has to it
    path.write_bytes(data)


async def test_a_flipped_byte_is_loaded_where_files_are_not_compared(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(diffs, "verify", lambda *_: None)
    before = (place(rig, OURS, 2) / "2.pages").read_bytes()
    flip(place(rig, OURS, 2) / "2.pages")
    await wakes(rig)
    entry: Any = rig.vmm.vms.get(OURS)
    assert before[0] ^ 1 in set(entry.machine.memory.values())


async def test_a_checksum_that_somebody_without_the_key_has_made(rig: Rig) -> None:
    """Other bytes, and a checksum that fits them under a key of the attacker's own."""
    snapshot = place(rig, OURS, 2)
    flip(snapshot / "devices.state")
    seals.use(seals.Keys("0badcafe", {"0badcafe": "00" * 32}))
    try:
        fits = diffs.checksum(snapshot / "devices.state")
    finally:
        seals.use(KEYS)
    known = json.loads((snapshot / diffs.MANIFEST).read_bytes())["manifest"]["files"]
    edited(
        snapshot,
        files=[one if one["name"] != "devices.state" else {"name": fits.name, "size": fits.size, "digest": fits.digest} for one in known],
    )
    await refused(rig, "its seal is of something else")


def swap(rig: Rig) -> None:
    """The other session's snapshot lies in the place of ours."""
    shutil.rmtree(place(rig, OURS, 2))
    shutil.copytree(place(rig, OTHERS, 1), place(rig, OURS, 2))


async def test_files_of_two_sessions_swapped(rig: Rig) -> None:
    ours, other = place(rig, OURS, 2), place(rig, OTHERS, 1)
    (ours / "1.pages").unlink()
    shutil.copy(other / "1.pages", ours / "1.pages")
    if (ours / "1.pages").read_bytes() == (rig.settings.root.parent / "older/1.pages").read_bytes():
        flip(other / "1.pages")
        shutil.copy(other / "1.pages", ours / "1.pages")
        shutil.copy(rig.settings.root.parent / "older/1.pages", other / "1.pages")
    await refused(rig, "1.pages is damaged")


async def test_snapshots_of_two_sessions_swapped(rig: Rig) -> None:
    swap(rig)
    await refused(rig, f"is of session {OTHERS}, and lies in the place of {OURS}'s")


async def test_a_swapped_snapshot_whose_manifest_was_edited(rig: Rig) -> None:
    swap(rig)
    (place(rig, OURS, 2) / "2.runs").write_bytes((place(rig, OURS, 2) / "1.runs").read_bytes())
    (place(rig, OURS, 2) / "2.pages").write_bytes((place(rig, OURS, 2) / "1.pages").read_bytes())
    edited(place(rig, OURS, 2), session=OURS, chain=[1, 2])
    await refused(rig, "its seal is of something else")


async def test_a_swapped_snapshot_is_loaded_where_seals_are_not_compared(rig: Rig, unsealed: Callable[[], None]) -> None:
    """The control: the memory is the other session's, which has counted to 1."""
    swap(rig)
    for kind in ("runs", "pages"):
        (place(rig, OURS, 2) / f"1.{kind}").rename(place(rig, OURS, 2) / f"2.{kind}")
    known = json.loads((place(rig, OURS, 2) / diffs.MANIFEST).read_bytes())["manifest"]["files"]
    edited(place(rig, OURS, 2), session=OURS, chain=[2], files=[one | {"name": one["name"].replace("1.", "2.")} for one in known])
    unsealed()
    assert await wakes(rig) == 1


def replay(rig: Rig, name: str) -> None:
    shutil.rmtree(place(rig, OURS, 2))
    shutil.copytree(rig.settings.root.parent / "older", rig.settings.sessions_dir / OURS / name)


async def test_an_older_snapshot_under_its_own_name(rig: Rig) -> None:
    replay(rig, "snapshot-1")
    await refused(rig, "is of incarnation 1, and the session slept with 2")


async def test_an_older_snapshot_under_the_newest_name(rig: Rig) -> None:
    replay(rig, "snapshot-2")
    await refused(rig, "is of incarnation 1, and lies in the place of another one's")


def as_the_newest(rig: Rig) -> None:
    replay(rig, "snapshot-2")
    for kind in ("runs", "pages"):
        (place(rig, OURS, 2) / f"1.{kind}").rename(place(rig, OURS, 2) / f"2.{kind}")
    known = json.loads((place(rig, OURS, 2) / diffs.MANIFEST).read_bytes())["manifest"]["files"]
    edited(place(rig, OURS, 2), chain=[2], files=[one | {"name": one["name"].replace("1.", "2.")} for one in known])


async def test_an_older_snapshot_whose_manifest_was_edited(rig: Rig) -> None:
    as_the_newest(rig)
    await refused(rig, "its seal is of something else")


async def test_an_older_snapshot_is_loaded_where_seals_are_not_compared(rig: Rig, unsealed: Callable[[], None]) -> None:
    """The control: the guest has forgotten its second life."""
    as_the_newest(rig)
    unsealed()
    assert await wakes(rig) == 1


async def test_an_older_diff_below_the_newest(rig: Rig) -> None:
    snapshot = place(rig, OURS, 2)
    for kind in ("runs", "pages"):
        (snapshot / f"2.{kind}").unlink()
        shutil.copy(rig.settings.root.parent / f"older/1.{kind}", snapshot / f"2.{kind}")
    await refused(rig, "is damaged")


async def test_another_accounts_manifest(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says whose it is not, and one that the instance has sealed for another account; then the control."""
    edited(place(rig, OURS, 2), account=ANOTHER)
    with pytest.raises(Damaged, match="its seal is of something else"):
        await wakes(rig)
    edited(place(rig, OURS, 2), account=ACCOUNT)
    assert diffs.read_manifest(place(rig, OURS, 2)).account == ACCOUNT, "it is as it was"
    known = diffs.read_manifest(place(rig, OURS, 2))
    known.account = ANOTHER
    diffs.write_manifest(place(rig, OURS, 2), known)
    await refused(rig, f"is of account {ANOTHER}, and its image of {ACCOUNT}")
    monkeypatch.setattr(SessionCalls, "_account_of", lambda *_: "")
    assert await wakes(rig) == 2


@pytest.mark.parametrize("name", ["snapshot-2", "snapshot-2/2.pages", "snapshot-2/devices.state", "snapshot-2/snapshot.json", "overlay"])
async def test_a_link_in_a_sessions_folder(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What it leads to is byte for byte what was there: it is refused for being a link. Then the control, which follows it."""
    path = rig.settings.sessions_dir / OURS / name
    away = tmp_path / "away" / OURS / path.name
    away.parent.mkdir(parents=True)
    path.rename(away)
    path.symlink_to(away)
    await refused(rig, "is a link|Too many levels of symbolic links|no plain file")
    monkeypatch.setattr(os.path, "islink", lambda path: False)
    monkeypatch.setattr(beneath, "opened", lambda directory, name, flags=os.O_RDONLY: os.open(directory / name, flags))
    assert await wakes(rig) == 2


def test_an_image_in_another_ones_place(tmp_path: Path, unsealed: Callable[[], None]) -> None:
    shape = Shape(512, 1, 1 << 30, "kvm", 512)
    for name, account in (("one", ACCOUNT), ("two", ANOTHER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "devices.state").write_bytes(name.encode())
        manifest.write(tmp_path / name, manifest.Manifest(shape, 1, 1, account=account, files=manifest.sums(tmp_path / name)))
    assert manifest.read(tmp_path / "one", "qemu").account == ACCOUNT
    (tmp_path / "one/devices.state").write_bytes(b"own")
    with pytest.raises(Damaged, match=r"devices\.state is damaged"):
        manifest.read(tmp_path / "one", "qemu")
    shutil.rmtree(tmp_path / "one")
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    with pytest.raises(Damaged, match="is of image two, and lies in the place of one's"):
        manifest.read(tmp_path / "one", "qemu")
    path = tmp_path / "one/manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"image":"two"', b'"image":"one"'))
    with pytest.raises(Damaged, match="its seal is of something else"):
        manifest.read(tmp_path / "one", "qemu")
    unsealed()
    assert manifest.read(tmp_path / "one", "qemu").account == ANOTHER, "the control"


def test_an_archive_of_somebodys_own_making(tmp_path: Path, unsealed: Callable[[], None]) -> None:
    """Control was taken over, and hands in a device state of its own, with the SHA-256 that fits."""
    made = {
        "manifest": {"chain": [1], "files": [], "overlay_bytes": 1, "session": OURS},
        "key": "0badcafe",
        "account": "",
        "mac": "00" * 32,
    }
    forged = tmp_path / "forged"
    packed = zstandard.ZstdCompressor().compress(tar({"overlay": b"x", "snapshot-1/snapshot.json": json.dumps(made).encode()}))
    forged.write_bytes(packed)
    digest = hashlib.sha256(packed).hexdigest()
    (tmp_path / "sessions").mkdir()
    target = tmp_path / "sessions" / OURS
    with forged.open("rb") as file:
        with pytest.raises(Damaged, match="its seal is of something else"):
            archives.unpack(file.fileno(), digest, target)
        assert not list(target.parent.iterdir())
        unsealed()
        archives.unpack(file.fileno(), digest, target)
    assert (target / "snapshot-1").is_dir(), "the control"


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        directory = tarfile.TarInfo("snapshot-1")
        directory.type, directory.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(directory)
        for name, data in files.items():
            one = tarfile.TarInfo(name)
            one.size = len(data)
            archive.addfile(one, io.BytesIO(data))
    return buffer.getvalue()


async def test_a_key_that_is_not_here(rig: Rig) -> None:
    """Of another instance, or lost: nothing ends, the session sleeps on, and wakes once the key is back."""
    seals.use(seals.new())
    try:
        with pytest.raises(Refused, match=r"which manifests\.key has not: put the key file of its instance back"):
            await wakes(rig)
    finally:
        seals.use(KEYS)
    assert await wakes(rig) == 2


def test_a_process_without_keys_opens_and_seals_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(seals.seal(seals.IMAGE, "", b"{}"))
    seals.use(None)
    try:
        for call in (lambda: seals.seal(seals.IMAGE, "", b"{}"), lambda: seals.opened(seals.IMAGE, tmp_path / "m.json"), seals.Checksum):
            with pytest.raises(Unavailable, match="no keys"):
                call()  # type: ignore[no-untyped-call]
    finally:
        seals.use(KEYS)


def test_a_kinds_seal_is_no_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(seals.seal(seals.IMAGE, "", b"{}"))
    assert seals.opened(seals.IMAGE, tmp_path / "m.json") == ("", b"{}")
    with pytest.raises(VmmError):
        seals.opened(seals.SNAPSHOT, tmp_path / "m.json")


def test_accounts_keys_are_as_rfc_5869_has_them() -> None:
    """Its first test case has a salt and 42 bytes; ours is of one block and no salt, so the reference is written out here."""
    extracted = hmac.new(b"\0" * 32, bytes.fromhex("5a" * 32), hashlib.sha256).digest()
    assert seals.derived("5a" * 32, b"p", "1") == hmac.new(extracted, b"p\x001\x01", hashlib.sha256).digest()
    assert seals.derived("5a" * 32, b"p", "1") != seals.derived("5a" * 32, b"p", "2")
