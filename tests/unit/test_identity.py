"""The store and the disks know each other: what does not belong together is said, and nothing is deleted at a start."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from test_lifecycle import Rig
from test_no_loss import asleep
from test_no_loss import rig as rig  # noqa: PLC0414

from gateway import messages as m
from gateway.config import ConfigError, Settings
from gateway.sessions.identity import Directory, Identity, Known, objection
from gateway.sessions.recovery import recover
from gateway.sessions.states import State
from gateway.sessions.store import SetAside, StoreError
from vmm import leftovers
from vmm.images import Images
from vmm.rpc.identity import IdentityCalls

STORE, SESSIONS = Path("torpor.db"), Path("sessions")
US, OTHER = "a" * 32, "b" * 32


def directory(mark: str = US, known: int = 0, strangers: int = 0, missing: int = 0, other: int = 0) -> Directory:
    names = [f"microvm-{number}" for number in range(9)]
    return Directory(SESSIONS, "microVM", mark, known, names[:strangers], names[:missing], names[:other])


@pytest.mark.parametrize(
    ("store", "found", "expected"),
    [
        (Known(STORE, "", False, True), directory(""), None),  # the first start
        (Known(STORE, "", False, False), directory("", 30, 2), None),  # an installation of before
        (Known(STORE, US, False, False), directory("", 3), None),  # a first start that was interrupted
        (Known(STORE, US, True, False), directory(US, 3, 1), None),
        (Known(STORE, US, True, False), directory(US, 60, 5), None),
        (
            Known(STORE, US, True, False),
            directory(US, 3, 2),
            "sessions holds 2 microVMs (microvm-0, microvm-1) that torpor.db does not know",
        ),
        (Known(STORE, US, True, False), directory(US, 600, 6), "sessions holds 6 microVMs (microvm-0, microvm-1, microvm-2, …) that"),
        (
            Known(STORE, US, True, False),
            directory(US, 60, 0, 6),
            "torpor.db knows 6 microVMs (microvm-0, microvm-1, microvm-2, …) whose files",
        ),
        (
            Known(STORE, US, True, False),
            directory(US, 60, 0, 0, 6),
            "sessions holds files of 6 microVMs (microvm-0, microvm-1, microvm-2, …) that are of other incarnations than torpor.db",
        ),
        (Known(STORE, US, True, False), directory(US, 60, 0, 0, 5), None),
        (Known(STORE, US, True, False), directory(OTHER), f"sessions belongs to another instance ({OTHER}) than torpor.db ({US})"),
        (Known(STORE, "", False, True), directory(US), f"sessions belongs to an instance ({US}) that torpor.db knows nothing of"),
        (
            Known(STORE, US, True, False),
            directory(""),
            "sessions has no instance id, and had one when torpor.db was last used: its file",
        ),
        (Known(STORE, "", False, True), directory("", 0, 1), "torpor.db is new, and sessions is not: it holds 1 microVM (microvm-0)"),
    ],
)
def test_what_belongs_together(store: Known, found: Directory, expected: str | None) -> None:
    said = objection(store, [found])
    assert (said or "").startswith(expected) if expected else said is None


@pytest.fixture
async def disks(rig: Rig) -> AsyncIterator[Rig]:
    """A host with an instance that has been started before."""
    one = await asleep(rig)
    await check(rig)
    assert one.state is State.SUSPENDED
    yield rig


async def check(rig: Rig, **settings: Any) -> None:
    await Identity(Settings(root=rig.directory, **settings), rig.store, rig.host).check(await rig.host.state())  # type: ignore[arg-type]


def strangers(rig: Rig, count: int) -> list[str]:
    names = [f"microvm-{number}" for number in range(count)]
    for name in names:
        rig.host.snapshots[name] = 3
        rig.host.disks[name] = rig.host.memories[name] = 3
    return names


async def test_an_installation_of_before_takes_an_id(rig: Rig) -> None:
    await asleep(rig)
    await check(rig)
    instance = rig.store.meta["instance"]
    assert rig.host.marked == m.Marks(instance, instance) and rig.store.meta["marked"] == "1"
    rig.host.calls.clear()
    await check(rig)
    assert not rig.host.calls


async def test_a_few_strangers_are_set_aside(disks: Rig) -> None:
    strangers(disks, 1)
    await check(disks)
    assert disks.host.aside["microvm-0"].reason == "The store does not know it." and list(disks.host.snapshots) == ["s1"]


async def test_a_stranger_that_runs_is_put_to_sleep_first(disks: Rig) -> None:
    strangers(disks, 1)
    del disks.host.snapshots["microvm-0"]
    disks.host.held["microvm-0"] = m.SessionState("microvm-0", 4, "running", 0, 0.0)
    await check(disks)
    assert disks.host.aside["microvm-0"].snapshot == 4


@pytest.mark.parametrize(("choice", "is_aside"), [("refuse", None), ("adopt", False), ("quarantine", True)])
async def test_many_strangers_are_the_operators_to_judge(disks: Rig, choice: str, is_aside: bool | None) -> None:
    names = strangers(disks, 6)
    before = dict(disks.host.snapshots)
    if is_aside is None:
        with pytest.raises(ConfigError, match=r"holds 6 microVMs .* Nothing was changed\. .*--adopt.*--quarantine"):
            await check(disks, strangers=choice)
    else:
        await check(disks, strangers=choice)
        assert set(disks.host.aside) == (set(names) if is_aside else set())
        await check(disks)  # the next start has nothing against them
    if not is_aside:
        assert disks.host.snapshots == before
    assert not any(call.startswith("forget") for call in disks.host.calls)


@pytest.mark.parametrize("choice", ["refuse", "adopt", "quarantine"])
async def test_a_directory_that_is_not_mounted_costs_nothing(disks: Rig, choice: str) -> None:
    """And what slept in it comes back with it."""
    one, files = disks.store.sessions["s1"], dict(disks.host.snapshots)
    disks.host.marked = m.Marks(disks.host.marked.images, "")
    disks.host.snapshots.clear()
    if choice == "refuse":
        with pytest.raises(ConfigError, match="has no instance id"):
            await check(disks)
        assert one.state is State.SUSPENDED and disks.host.marked.sessions == ""
        return
    kept = {**disks.host.disks}
    disks.host.disks.clear()
    await check(disks, strangers=choice)
    await recover(disks.lifecycle, await disks.host.state())
    await disks.reach(one, State.TERMINATED)
    assert one.is_aside
    disks.host.snapshots |= files
    disks.host.disks |= kept
    await recover(disks.lifecycle, await disks.host.state())
    assert "s1" in disks.host.aside and disks.store.sessions["s1"] is one


async def test_a_new_store_over_old_disks_deletes_nothing(rig: Rig) -> None:
    """A damaged store that was moved aside, or a wrong --root."""
    strangers(rig, 1)
    rig.host.images.append("k-1.0")
    with pytest.raises(ConfigError, match=r"is new, and .*images is not"):
        await check(rig)
    assert rig.host.images and rig.host.snapshots and not rig.host.calls and not rig.store.meta


async def test_an_image_that_nobody_knows_is_set_aside(disks: Rig) -> None:
    disks.host.images.append("k-1.0")
    await check(disks)
    assert not disks.host.images and any(call.startswith("quarantine_image") for call in disks.host.calls)


async def test_no_image_is_a_stranger_while_an_images_row_cannot_be_read(disks: Rig) -> None:
    """Nobody knows which keys are its."""
    disks.host.images.append("k-1.0")
    strangers(disks, 1)
    disks.store.set_aside = [SetAside("images", "arn", 0.0, "torn"), SetAside("sessions", "microvm-0", 0.0, "torn")]
    await check(disks)
    assert disks.host.images == ["k-1.0"] and "microvm-0" in disks.host.snapshots


async def test_an_id_that_cannot_be_stored_marks_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails() -> None:
        raise StoreError("full")

    with monkeypatch.context() as patch:
        patch.setattr(rig.store, "commit", fails)
        with pytest.raises(StoreError):
            await check(rig)
    assert rig.host.marked == m.Marks("", "")


async def test_what_was_never_run_is_no_stranger(disks: Rig) -> None:
    """Of a launch whose control died."""
    for number, phase in enumerate(["prepared"] * 9):
        disks.host.held[f"microvm-{number}"] = m.SessionState(f"microvm-{number}", 1, phase, 0, 0.0)
    disks.host.held["ahead-1"] = m.SessionState("ahead-1", 1, "running", 0, 0.0)
    await check(disks)
    assert not disks.host.aside


# ---- what root writes ----


async def test_marks_are_durable_and_read_again(tmp_path: Path) -> None:
    settings = Settings(root=tmp_path)
    for path in (settings.images_dir, settings.sessions_dir):
        path.mkdir()
    calls = IdentityCalls(settings, Images(settings.images_dir))
    assert await calls.rpc_marks(None, None) == m.Marks("", "")  # type: ignore[arg-type]
    await calls.rpc_mark(None, m.MarkRequest(US))  # type: ignore[arg-type]
    assert await IdentityCalls(settings, Images(settings.images_dir)).rpc_marks(None, None) == m.Marks(US, US)  # type: ignore[arg-type]
    (settings.images_dir / "instance-id").write_bytes(b"\xff\n")  # damaged: it is another's then, and says so
    assert (await calls.rpc_marks(None, None)).images == "\\xff"  # type: ignore[arg-type]
    assert [path.name for path in settings.sessions_dir.iterdir()] == ["instance-id"]


async def test_an_image_is_set_aside_by_one_rename(tmp_path: Path) -> None:
    settings = Settings(root=tmp_path)
    (settings.images_dir / "k-1.0").mkdir(parents=True)
    (settings.images_dir / "k-1.0/manifest.json").write_text("{}")
    for _ in range(2):
        await IdentityCalls(settings, Images(settings.images_dir)).rpc_quarantine_image(None, m.ImageQuarantineRequest("k-1.0", "unknown"))  # type: ignore[arg-type]
    assert {path.name for path in (tmp_path / "quarantine/image-k-1.0").iterdir()} == {"manifest.json", "reason.json"}
    assert not list(settings.images_dir.iterdir())


def test_a_repair_removes_no_sleeper_and_no_image_that_the_store_does_not_know(tmp_path: Path) -> None:
    settings = Settings(root=tmp_path, run=tmp_path / "run")
    for name in ("sessions/microvm-1/snapshot-3", "sessions/microvm-2", "images/.half", "images/k-1.0"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "images/k-1.0/manifest.json").write_text("{}")
    for name in ("images", "sessions"):
        (tmp_path / name / "instance-id").write_text(US)
    found = {Path(one.what).name for one in leftovers._files(settings, set(), set())}
    assert found == {"microvm-2", ".half"}
    assert [path.name for path in leftovers.strangers(settings, set(), set())] == ["microvm-1", "k-1.0"]


def test_doctor_knows_what_a_crash_leaves_of_a_removal_a_fold_a_suspend_and_a_fetch(tmp_path: Path) -> None:
    """None of it is a microVM that the store does not know, and a repair removes all of it."""
    settings = Settings(root=tmp_path, run=tmp_path / "run")
    left = {
        ".void-1-microvm-2", ".unpacked-1-microvm-3",
        "microvm-1/fold-1", "microvm-1/new-1", "microvm-1/snapshot.new", "microvm-1/void-1-snapshot-1",
    }  # fmt: skip
    for name in left | {"microvm-1/snapshot-2", "microvm-1/memory"}:
        (tmp_path / "sessions" / name).mkdir(parents=True)
    for name in (".void-1-microvm-2", ".unpacked-1-microvm-3"):
        (tmp_path / "sessions" / name / "snapshot-3").mkdir()
    assert not leftovers.strangers(settings, {"microvm-1"}, set())
    found = list(leftovers._files(settings, {"microvm-1"}, set()))
    assert {str(Path(one.what).relative_to(tmp_path / "sessions")) for one in found} == left
    for one in found:
        leftovers.mend(settings, one)
    assert sorted(path.name for path in (tmp_path / "sessions/microvm-1").iterdir()) == ["memory", "snapshot-2"]


@pytest.mark.parametrize(("snapshot", "age"), [(5, "a later"), (1, "an earlier")])
async def test_a_store_of_another_time_than_its_sleepers_says_so_and_what_brings_them_back(disks: Rig, snapshot: int, age: str) -> None:
    one = disks.store.sessions["s1"]
    one.incarnation = 3
    disks.store.put_session(one)
    await disks.store.commit()
    disks.host.snapshots["s1"] = snapshot
    await check(disks)
    await recover(disks.lifecycle, await disks.host.state())
    await disks.reach(one, State.TERMINATED)
    assert one.is_aside and "s1" in disks.host.aside
    assert one.reason == (
        f"The files of the MicroVM are of incarnation {snapshot}, {age} one than the store knows (3): the store and the disks are of different "
        "times. They are set aside, and `torpor recover s1` brings them back."
    )
