"""What was set aside comes back under its id and endpoint, or its disk does; it goes by age and for room, and nothing else."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
from test_lifecycle import Rig
from test_no_loss import asleep, resumes
from test_no_loss import rig as rig  # noqa: PLC0414

from gateway import config
from gateway import messages as m
from gateway.cli import quarantine as command
from gateway.cli import repair
from gateway.rpc import RpcError, RpcLost
from gateway.sessions import host as hosting
from gateway.sessions.model import Archived, Session
from gateway.sessions.quarantine import DAY_SECONDS, Quarantine, RecoverError, leaving
from gateway.sessions.recovery import recover
from gateway.sessions.states import Event, State
from gateway.sessions.store import StoreError
from gateway.sessions.timers import Deadline


@pytest.fixture
async def quarantine(rig: Rig) -> AsyncIterator[Quarantine]:
    yield Quarantine(config.Quarantine(), rig.store, rig.host, rig.lifecycle, lambda: rig.wall)  # type: ignore[arg-type]


async def set_aside(rig: Rig, **changes: object) -> Session:
    one = await asleep(rig, **changes)
    rig.host.fail["prepare"] = [RpcError("Damaged", "checksum of 1.pages")]
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.reach(one, State.TERMINATED)
    return one


async def test_it_sleeps_again_under_its_id_and_endpoint(rig: Rig, quarantine: Quarantine) -> None:
    one = await set_aside(rig)
    rig.wall += 3 * DAY_SECONDS
    assert await quarantine.recover("s1") is one
    route = rig.lifecycle.routes.find("h1")
    assert (one.state, one.reason, one.is_aside, one.terminated_at) == (State.SUSPENDED, None, False, None)
    assert route is not None and (route.session, route.gate) == ("s1", "hold")
    row = (await rig.store.events("s1"))[-1]
    assert (row.event, row.old, row.new) == ("recovered", "TERMINATED", "SUSPENDED") and "checksum" in row.detail
    assert one.expires_at >= rig.wall + 3600, "the days in the quarantine are none of its life"
    assert await resumes(rig, one)


async def test_what_is_still_damaged_stays_aside(rig: Rig, quarantine: Quarantine) -> None:
    one = await set_aside(rig)
    rig.host.fail["recover"] = [RpcError("Damaged", "checksum of 1.pages")]
    with pytest.raises(RecoverError, match=r"checksum.*recover s1 --disk FILE"):
        await quarantine.recover("s1")
    assert one.state is State.TERMINATED and one.is_aside and "s1" in rig.host.aside


async def test_a_disk_that_went_on_without_its_memory_is_not_put_under_it(rig: Rig, quarantine: Quarantine) -> None:
    one = await set_aside(rig)
    one.incarnation += 1  # that ran, as its row says, and whose snapshot was never made
    with pytest.raises(RecoverError, match="--disk"):
        await quarantine.recover("s1")
    assert "s1" in rig.host.aside
    rig.host.aside["s1"].is_disk_as_saved = True  # it was stopped before it wrote
    await quarantine.recover("s1")
    assert one.incarnation == 1 and await resumes(rig, one)


@pytest.mark.parametrize("name", ["s1", "unknown"])
async def test_what_is_not_aside_is_not_recovered(rig: Rig, quarantine: Quarantine, name: str) -> None:
    await asleep(rig)
    with pytest.raises(RecoverError, match=r"nothing of it is set aside|knows no microVM"):
        await quarantine.recover(name)


async def test_a_recovery_that_cannot_be_stored_is_taken_back(rig: Rig, quarantine: Quarantine, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await set_aside(rig)

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(rig.store, "_transaction", full)
        with pytest.raises(StoreError):
            await quarantine.recover("s1")
    assert one.state is State.TERMINATED and one.is_aside and one.terminated_at and "s1" in rig.host.aside
    await quarantine.recover("s1")
    assert await resumes(rig, one)


async def test_a_recovery_that_was_interrupted_is_begun_anew(rig: Rig, quarantine: Quarantine) -> None:
    """The files were back, and the row was not stored: nothing of a session that is TERMINATED stays among the others."""
    one = await set_aside(rig)
    await rig.host.recover("s1")
    await recover(rig.lifecycle, await rig.host.state())
    assert "s1" in rig.host.aside and not rig.host.snapshots
    await quarantine.recover("s1")
    assert await resumes(rig, one)


@pytest.mark.parametrize("is_told", [True, False])
async def test_a_recovery_whose_answer_is_lost_is_asked_for_again(
    rig: Rig, quarantine: Quarantine, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:  # fmt: skip
    """By us, or where vmm stays away by the operator: what came back is known by what the files say, not by what lay aside."""
    monkeypatch.setattr(hosting, "_AWAY_SECONDS", 10.0 if is_told else -1.0)
    monkeypatch.setattr(hosting, "_AWAY_RETRY_SECONDS", 0.0)
    one = await set_aside(rig)
    one.incarnation += 1  # it was stopped before it wrote
    rig.host.aside["s1"].is_disk_as_saved = True
    rig.host.lose["recover"] = 1
    if not is_told:
        rig.host.lose["recover"] = 2
        with pytest.raises(RpcLost):
            await quarantine.recover("s1")
    await quarantine.recover("s1")
    assert one.state is State.SUSPENDED and one.incarnation == 1, "the row and the files are of one incarnation"
    assert await resumes(rig, one)


async def test_it_is_brought_back_once(rig: Rig, quarantine: Quarantine) -> None:
    """Twice at once, while what is old is removed: the second hears that nothing is aside any more."""
    one = await set_aside(rig)
    rig.host.block["recover"] = asyncio.Event()
    works = [asyncio.create_task(work) for work in (quarantine.recover("s1"), quarantine.recover("s1"), quarantine.empty())]
    await rig.host.reached["recover"].wait()
    rig.wall += 20 * DAY_SECONDS
    rig.host.block.pop("recover").set()
    first, second, third = await asyncio.gather(*works, return_exceptions=True)
    assert first is one and isinstance(second, RecoverError) and third is None and await resumes(rig, one)


async def test_an_archive_is_fetched_again(rig: Rig, quarantine: Quarantine) -> None:
    one = await set_aside(rig)
    rig.host.aside.clear()
    one.archived = Archived("s1", 1, "digest")
    await quarantine.recover("s1")
    assert one.state is State.SUSPENDED and one.archived is not None


@pytest.mark.parametrize("is_same", [True, False])
async def test_files_that_are_here_as_well_as_in_the_archive(rig: Rig, is_same: bool) -> None:
    """Of an archive whose end was interrupted, or of a store that is older than its disks: neither is deleted for the other's sake."""
    one = await asleep(rig)
    one.archived, rig.archive.kept = Archived("s1", 1, "digest"), ["s1"]
    one.incarnation = 1 if is_same else 7
    await recover(rig.lifecycle, await rig.host.state())
    await rig.lifecycle.quiet()
    if is_same:
        assert one.archived is None and not rig.archive.kept and await resumes(rig, one)
    else:
        assert one.archived is not None and rig.archive.kept and "s1" in rig.host.aside and one.state is State.SUSPENDED


# ---- how it is emptied ----


def aside(name: str, days: float, mib: int) -> m.Quarantined:
    return m.Quarantined(name, 1, "image", "why", -days * DAY_SECONDS, mib << 20)


@pytest.mark.parametrize(
    ("found", "gone"),
    [
        ([], []),
        ([aside("new", 1, 10), aside("old", 15, 10)], ["old"]),
        ([aside("c", 1, 40), aside("b", 2, 40), aside("a", 3, 40)], ["a"]),
        ([aside("b", 1, 40), aside("old", 15, 80)], ["old"]),
        ([aside("only", 1, 200)], ["only"]),
    ],
)
def test_the_oldest_goes(found: list[m.Quarantined], gone: list[str]) -> None:
    assert [one.session for one, _ in leaving(found, config.Quarantine(days=14, mib=100), 0.0)] == gone


async def test_a_row_goes_when_its_files_have_gone(rig: Rig, quarantine: Quarantine) -> None:
    one = await set_aside(rig)
    rig.host.aside["s1"].at = rig.wall
    await quarantine.empty()
    assert one.is_aside and not rig.lifecycle.timers.is_set(one, Deadline.PURGE) and "s1" in rig.host.aside
    rig.wall += 13.5 * DAY_SECONDS
    await quarantine.empty()
    assert one.is_aside
    rig.wall += DAY_SECONDS
    await quarantine.empty()
    assert not one.is_aside and rig.lifecycle.timers.is_set(one, Deadline.PURGE) and not rig.host.aside


@pytest.mark.parametrize("why", ["room is short", "the clock was set", "control was started again"])
async def test_nothing_goes_that_was_not_said_to_go_the_time_before(rig: Rig, quarantine: Quarantine, why: str) -> None:
    one = await set_aside(rig)
    rig.host.aside["s1"].at = rig.wall
    await quarantine.empty()
    if why == "room is short":
        rig.host.aside["s1"].bytes = 1 << 40
    else:
        rig.wall += 15 * DAY_SECONDS
    if why == "control was started again":
        quarantine = Quarantine(config.Quarantine(), rig.store, rig.host, rig.lifecycle, lambda: rig.wall)  # type: ignore[arg-type]
    with structlog.testing.capture_logs() as said:
        await quarantine.empty()
    assert one.is_aside and "s1" in rig.host.aside
    assert [line["session"] for line in said if line["event"] == "quarantine.leaves_soon"] == ["s1"]
    await quarantine.empty()
    assert not one.is_aside and not rig.host.aside


async def test_a_row_without_files_stays_as_long(rig: Rig, quarantine: Quarantine) -> None:
    """A file system that is not mounted now may be, by and by."""
    one = await set_aside(rig)
    rig.host.aside.clear()
    await quarantine.empty()
    assert one.is_aside
    rig.wall += 15 * DAY_SECONDS
    await quarantine.empty()
    assert not one.is_aside


async def test_it_goes_by_its_users_word_and_not_while_it_is_brought_back(rig: Rig, quarantine: Quarantine) -> None:
    one = await set_aside(rig)
    rig.host.block["recover"] = asyncio.Event()
    back = asyncio.ensure_future(quarantine.recover("s1"))
    await rig.host.reached["recover"].wait()
    late = asyncio.ensure_future(quarantine.release(one))
    rig.host.block.pop("recover").set()
    await asyncio.gather(back, late)
    assert one.state is State.SUSPENDED and not any(call.startswith("release_quarantined") for call in rig.host.calls)
    rig.host.fail["prepare"] = [RpcError("Damaged", "checksum of 1.pages")]
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.reach(one, State.TERMINATED)
    rig.host.fail["release_quarantined"] = [RpcError("Unavailable", "the disk is away")]
    with pytest.raises(RpcError):
        await quarantine.release(one)
    assert one.is_aside and "s1" in rig.host.aside
    await quarantine.release(one)
    assert not one.is_aside and not rig.host.aside and rig.lifecycle.timers.is_set(one, Deadline.PURGE)


# ---- what the commands say ----


def quarantined(settings: config.Settings, name: str, image: str = "k-1.0") -> Path:
    files = settings.root / "quarantine" / name
    files.mkdir(parents=True)
    (files / "reason.json").write_text(json.dumps({"session": name, "incarnation": 1, "image": image, "reason": "checksum", "at": 1.0}))
    return files


def test_doctor_lists_it_with_reason_age_bytes_and_the_day_it_goes(tmp_path: Path) -> None:
    settings = config.Settings(root=tmp_path)
    (quarantined(settings, "microvm-1") / "overlay").write_bytes(b"x" * (2 << 20))
    total, one = command.rows(settings)
    assert total[:2] == ("quarantine", True) and "1 set aside, 2 of 20480 MiB" in total[2]
    assert not one[1] and one[2].startswith("microvm-1: checksum (") and "days ago, 2 MiB; removed on 1970-01-15)" in one[2]
    assert "torpor recover microvm-1 cannot bring it back without a snapshot" in one[2] and "--disk FILE" in one[2]


async def test_doctor_lists_what_an_error_has_ended_and_whose_files_are_elsewhere(rig: Rig, tmp_path: Path) -> None:
    """Whose disk was not mounted, say: nothing in the quarantine speaks of it, and its row keeps its time."""
    settings = config.Settings(root=tmp_path)
    for name, archived in (("away", None), ("archived", Archived("key", 1, "digest")), ("here", None), ("live", None)):
        one = Session(name, name, "arn:aws:lambda:us-east-1:123456789012:microvm-image:a", "1.0", "k", 512, 0.0, 3600, archived=archived)
        one.state, one.is_aside, one.reason = (State.SUSPENDED, False, None) if name == "live" else (State.TERMINATED, True, "Not there.")
        rig.store.put_session(one)
    await rig.store.commit()
    quarantined(settings, "here")
    said = repair.away_of(settings, repair.known(rig.store._path))
    assert [(kind, is_well) for kind, is_well, _ in said] == [("set aside", False)] * 2
    texts = sorted(text for _, _, text in said)
    assert texts[0] == "archived: Not there.; torpor recover archived brings it back: its archive is kept"
    assert texts[1] == f"away: Not there.; torpor recover away brings it back: once {tmp_path}/sessions/away is back (a mount, a backup)"


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")
def test_the_disk_is_handed_out_as_one_file_with_all_its_layers(tmp_path: Path) -> None:
    settings = config.Settings(root=tmp_path)
    files, image = quarantined(settings, "microvm-1"), settings.images_dir / "k-1.0"
    image.mkdir(parents=True)
    (image / "manifest.json").write_text('{"manifest": {"hypervisor": "qemu"}}')
    (image / "disk.raw").write_bytes(b"A" * 65536 + bytes((1 << 20) - 65536))
    for path in (image / "boot.qcow2", files / "overlay"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 0x42 128k 64k", str(files / "overlay")], check=True, capture_output=True)
    command.hand_out(settings, "microvm-1", tmp_path / "disk")
    data = (tmp_path / "disk").read_bytes()
    assert len(data) == 1 << 20 and data[:65536] == b"A" * 65536 and data[131072 : 131072 + 65536] == b"\x42" * 65536
    assert (files / "overlay").exists()


@pytest.mark.parametrize("place", ["images/k-1.0", "quarantine/image-k-1.0"])
def test_a_strangers_disk_is_handed_out_with_the_image_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """No store knows whose image it is, and its files do not say it."""
    settings = config.Settings(root=tmp_path)
    files, image = quarantined(settings, "microvm-1", ""), tmp_path / place
    image.mkdir(parents=True)
    (image / "manifest.json").write_text('{"manifest": {"hypervisor": "firecracker"}}')
    (files / "overlay").write_bytes(b"disk")
    for wrong in ("", "k-2.0", ".."):
        with pytest.raises(SystemExit):
            command.hand_out(settings, "microvm-1", tmp_path / "disk", wrong)
        assert "name its image with --image (k-1.0)" in capsys.readouterr().err
    command.hand_out(settings, "microvm-1", tmp_path / "disk", "k-1.0")
    assert (tmp_path / "disk").read_bytes() == b"disk"


def test_a_disk_that_is_not_there_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config.Settings(root=tmp_path)
    quarantined(settings, "microvm-1")
    for name in ("microvm-1", "microvm-2"):
        with pytest.raises(SystemExit):
            command.hand_out(settings, name, tmp_path / "disk")
    assert "is not there" in capsys.readouterr().err and not (tmp_path / "disk").exists()
