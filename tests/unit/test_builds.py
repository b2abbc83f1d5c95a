"""Layer stores: one for each account, with ids that no other has; and where BuildKit takes images from."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import re
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gateway import executors
from gateway.addresses import CLOSED
from gateway.messages import BuildRequest, BuildResult
from vmm import build_mirrors, builds
from vmm.build_network import Child, network_rules
from vmm.build_stores import RANGE, Stores, id_maps
from vmm.builds import Builder, BuildSettings, canonical, source_policy
from vmm.cgroups import Cgroups
from vmm.errors import DiskFull, Missing, Unavailable, VmmError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="stores have owners")
FIRST = 1 << 30
BASE = "public.ecr.aws/lambda/microvms:al2023-minimal"


def test_accounts_share_no_ids_and_keep_theirs(tmp_path: Path) -> None:
    stores = Stores(tmp_path, FIRST)
    one, other = stores.open("111111111111", []), stores.open("222222222222", [])
    assert (one[1], other[1]) == (FIRST, FIRST + RANGE) and one[0] != other[0]
    assert (one[0].stat().st_uid, one[0].stat().st_mode & 0o777) == (FIRST, 0o700)
    stores.drop("111111111111")
    assert not one[0].exists()
    again = Stores(tmp_path, FIRST)
    assert again.open("222222222222", [])[1] == FIRST + RANGE and again.open("333333333333", [])[1] == FIRST


def test_single_ids_keep_their_place_whatever_is_built_later(tmp_path: Path) -> None:
    stores = Stores(tmp_path, FIRST)
    assert stores.open("a", [1000730000])[2] == [1000730000]
    assert stores.open("a", [2000000, 1000730000])[2] == [1000730000, 2000000] == stores.open("a", [])[2]
    maps = id_maps("map-users", FIRST, [1000730000, 2000000]).split()
    assert maps[0] == f"--map-users=0:{FIRST}:{RANGE - 256}" and RANGE - 256 > 1_000_000
    assert maps[1:] == [f"--map-users=1000730000:{FIRST + RANGE - 256}:1", f"--map-users=2000000:{FIRST + RANGE - 255}:1"]
    assert len(stores.open("a", list(range(3_000_000, 3_000_254)))[2]) == 256


def test_an_id_that_the_range_has_is_not_mapped_again(tmp_path: Path) -> None:
    """The kernel takes no id twice: all builds of the account would fail, for as long as its store knows the id."""
    stores = Stores(tmp_path, FIRST)
    assert stores.open("a", [1_000_001, 1_048_319, 1_048_320])[2] == [1_048_320]
    (tmp_path / "a/users").write_text("1000001 2000000")  # kept by a service of before
    assert stores.open("a", [])[2] == [2_000_000]


def test_accounts_that_are_new_at_once_share_no_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores, both = Stores(tmp_path, FIRST), threading.Barrier(2)
    chown = os.chown

    def late(*arguments: Any) -> None:
        """A store is not yet there while the other account looks for a free range."""
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)
        chown(*arguments)

    monkeypatch.setattr(os, "chown", late)
    with ThreadPoolExecutor(2) as threads:
        opened = list(threads.map(lambda account: stores.open(account, []), ("111111111111", "222222222222")))
    assert {first for _, first, _ in opened} == {FIRST, FIRST + RANGE}


def test_a_store_that_nobody_used_for_long_goes(tmp_path: Path) -> None:
    stores = Stores(tmp_path, FIRST)
    for name in ("old", "busy", "new"):
        stores.open(name, [])
    for name in ("old", "busy"):
        os.utime(tmp_path / name / "users", (0, 0))
    stores.drop_unused(30.0, lambda account: account == "busy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["busy", "new"]


def test_a_removal_that_was_cut_off_hinders_no_other(tmp_path: Path) -> None:
    """Or a store that is broken would stay, and all builds of the account would fail."""
    stores = Stores(tmp_path, FIRST)
    stores.open("a", [])
    (tmp_path / "a/store.old/left").mkdir(parents=True)
    stores.drop("a")
    assert not (tmp_path / "a").exists()


async def test_a_log_that_is_full_holds_up_its_own_build_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = Builder(tmp_path, tmp_path, Cgroups("builds-unit", tmp_path), BuildSettings(tmp_path, tmp_path, tmp_path, (), False, FIRST))
    out, log = os.pipe()
    os.set_blocking(log, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(log, bytes(4096))
    os.set_blocking(log, True)

    async def ends(*_: object) -> BuildResult:
        raise TimeoutError

    monkeypatch.setattr(builder, "_jailed", ends)
    request = BuildRequest("b", "image", "111111111111", [], 0, {})
    rescue = threading.Timer(1, os.read, (out, 1 << 20))  # of a loop that stands still
    rescue.start()
    begun = time.monotonic()
    running = asyncio.create_task(builder._run(request, tmp_path, log, os.dup(log)))
    await asyncio.sleep(0.01)
    assert time.monotonic() - begun < 0.9 and not running.done()
    rescue.cancel()
    os.read(out, 1 << 20)
    reason = "the build took longer than 1800 s (images.build_seconds)"
    assert (await running).reason == reason and os.read(out, 99).decode().endswith(f"torpor: {reason}\n")
    os.close(out)


def test_a_store_with_a_bound_is_a_file_system_of_that_size(tmp_path: Path) -> None:
    """Of another size, or without one, it is made afresh: it is a cache. Its account keeps its ids."""
    (tmp_path / "a/store/overlay2").mkdir(parents=True)  # of a service of before
    share = 256 << 20
    store, first, _ = Stores(tmp_path, FIRST, share).open("a", [])
    assert store == tmp_path / "a/store.ext4" and store.stat().st_size == share and store.stat().st_blocks * 512 < share // 32
    assert (store.stat().st_uid, store.stat().st_mode & 0o777, first) == (0, 0o600, FIRST) and not list((tmp_path / "a/store").iterdir())
    told = subprocess.run(["dumpe2fs", "-h", store], capture_output=True, text=True, check=True).stdout
    assert re.search(r"Inode count: +16384\n", told) and re.search(r"Reserved block count: +0\n", told)
    made = store.stat().st_ino
    assert Stores(tmp_path, FIRST, share).open("a", [])[0].stat().st_ino == made
    assert Stores(tmp_path, FIRST, 2 * share).open("a", [])[0].stat().st_size == 2 * share
    assert Stores(tmp_path, FIRST).open("a", [])[0].is_dir() and not store.exists()


def test_a_build_is_given_what_the_host_has_and_no_other_build(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is left: its disk takes as much again. One that the disk has no room for is refused before it begins."""
    gib = 1 << 30
    builder._directory.mkdir()
    builder._settings = dataclasses.replace(builder._settings, store_mib=32 << 10, kept_bytes=gib)
    monkeypatch.setattr(builds, "disk_free_bytes", lambda path: 101 * gib)
    assert builder._take_room("one") == 32 * gib
    assert builder._take_room("other") == 18 * gib
    with pytest.raises(builds._NoRoom, match="the host's disk has no room for a build: 0 MiB beside"):
        builder._take_room("third")
    del builder._room["one"]
    assert builder._take_room("third") == 32 * gib
    builder._settings, builder._room = dataclasses.replace(builder._settings, store_mib=0), {}
    assert builder._take_room("without a bound") == 50 * gib


async def test_a_build_that_the_disk_has_no_room_for_fails_in_one_line(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("accounts", "work"):
        (builder._directory / name).mkdir(parents=True)
    monkeypatch.setattr(builds, "disk_free_bytes", lambda path: 1 << 20)
    ends = await begun(builder)
    result = await builder.result("b")
    assert (result.status, result.disk_full) == (1, True) and result.reason.startswith("the host's disk has no room for a build: 1 MiB")
    assert not builder._room and not list((builder._directory / "work").iterdir())
    for end in ends:
        os.close(end)


def test_an_account_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(VmmError, match="no layer store"):
        Stores(tmp_path, FIRST).open("../x", [])


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("python", "docker.io/library/python:latest"), ("a/b:1", "docker.io/a/b:1"), ("localhost/x", "localhost/x:latest"),
        ("example.com:5000/x", "example.com:5000/x:latest"), (BASE, BASE),
    ],
)  # fmt: skip
def test_names_are_completed_as_docker_does(name: str, full: str) -> None:
    assert canonical(name) == full


def test_a_build_reaches_neither_the_host_nor_its_neighbours_where_these_have_public_addresses() -> None:
    """Microvms' list had more than builds', and neither had the host's own addresses. Sets of nft take no ranges that overlap."""
    rules = network_rules({"10.0.2.3", "10.7.0.1"}, [*CLOSED, "10.7.0.0/16", "203.0.113.0/24", "203.0.113.9", "198.51.100.7"])
    accepted, rejected = (
        line.partition("{ ")[2].partition(" }")[0].split(", ") for line in rules.splitlines() if line.startswith("ip daddr")
    )
    assert accepted == ["10.0.2.3", "10.7.0.1"]
    assert {"203.0.113.0/24", "198.51.100.7/32", "192.0.0.0/24", "198.18.0.0/15", "0.0.0.0/8"} <= set(rejected)
    assert rejected.count("10.0.0.0/8") == 1 and "10.7.0.0/16" not in rejected and "203.0.113.9/32" not in rejected
    assert rules.index(" accept\nip daddr { 0.") > 0, "what is lent comes first"


def test_every_tag_and_digest_is_converted_and_nothing_else() -> None:
    rules = source_policy((BASE,), False)["rules"]
    assert isinstance(rules, list)
    assert [rule["action"] for rule in rules] == ["DENY", "ALLOW", "CONVERT"]
    pattern = re.compile(rules[2]["selector"]["identifier"])
    name = "docker-image://public.ecr.aws/lambda/microvms"
    assert all(pattern.match(name + end) for end in (":latest", ":x@sha256:0a", "@sha256:0a", ""))
    assert not any(pattern.match(name + end) for end in ("-other:1", "/more:1", ":1/x"))
    assert [rule["action"] for rule in source_policy((), True)["rules"]] == []  # type: ignore[attr-defined]


async def test_stores_of_buildah_go_at_the_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All accounts shared them; they were a cache."""
    for name in ("store/overlay", "runroot", "tmp/buildah-cache", "work/left", "settings"):
        (tmp_path / "builds" / name).mkdir(parents=True)
    monkeypatch.setattr(build_mirrors, "prepare", lambda directory: None)
    cgroups = Cgroups("builds-unit", tmp_path)
    settings = BuildSettings(tmp_path / "base.tar", tmp_path, tmp_path, (BASE,), False, FIRST)
    one = Builder(tmp_path / "builds", tmp_path / "netns", cgroups, settings)
    for _ in range(2):
        with monkeypatch.context() as patch:  # microVMs wait for a daemon that starts, and a build's context may have 100,000 files
            patch.setattr(shutil, "rmtree", lambda *_, **__: pytest.fail("a start removes no trees"))
            one.start()
        assert sorted(path.name for path in (tmp_path / "builds").iterdir()) == ["accounts", "settings", "work"]
    await one._drop_left()
    assert not list((tmp_path / "builds/work").iterdir())


# ---- builds that nobody waits for any more, that leave too much, that the host cannot carry out ----

REQUEST = BuildRequest("b", "image", "111111111111", [], 0, {})


class Jail:
    """In place of a jail: a build that runs until it is told to end."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0
        self.end = asyncio.Event()
        self.result: BuildResult | Exception = BuildResult(0, "{}", False, False)

    async def __call__(self, request: BuildRequest, image: Path, log: int, phases: int) -> BuildResult:
        self.begun += 1
        try:
            os.write(log, b"building\n")
            await self.end.wait()
        finally:
            self.ended += 1
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    (tmp_path / "netns").mkdir()
    settings = BuildSettings(tmp_path / "base.tar", tmp_path, tmp_path, (), False, FIRST)
    return Builder(tmp_path / "builds", tmp_path / "netns", Cgroups(f"builds-unit-{os.getpid()}", tmp_path), settings)


@pytest.fixture
def jail(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> Jail:
    one = Jail()
    monkeypatch.setattr(builder, "_jailed", one)
    return one


async def begun(builder: Builder, request: BuildRequest = REQUEST) -> list[int]:
    ends = list(await builder.begin(request, Path("/nowhere"), *(os.memfd_create("source") for _ in range(2))))
    await asyncio.sleep(0)
    return ends


async def test_a_result_whose_answer_was_lost_is_there_again(builder: Builder, jail: Jail) -> None:
    ends = await begun(builder)
    jail.end.set()
    assert await builder.result("b") == await builder.result("b") == jail.result
    assert builder.names == [], "it is under way no more"
    await builder.cancel("b")
    with pytest.raises(Missing, match="not known"):
        await builder.result("b")
    for end in ends:
        os.close(end)


async def test_a_build_that_is_begun_again_ends_the_one_that_nobody_follows(builder: Builder, jail: Jail) -> None:
    first = await begun(builder)
    again = await begun(builder)
    assert (jail.begun, jail.ended) == (2, 1) and builder.names == ["b"]
    assert os.read(first[0], 99) == b"building\n" and os.read(first[0], 99) == b"", "its log has ended"
    waiting = asyncio.create_task(builder.result("b"))
    jail.end.set()
    assert await waiting == jail.result
    for end in (*first, *again):
        os.close(end)


async def test_a_build_that_is_called_off_twice_is_cleared_away_once(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second order comes while the first is carried out: the answer to it was lost."""
    cleared, go_on = [], asyncio.Event()

    async def jailed(*_: object) -> BuildResult:
        try:
            await asyncio.Event().wait()
        finally:
            await go_on.wait()
            cleared.append(True)
        raise AssertionError

    monkeypatch.setattr(builder, "_jailed", jailed)
    ends = await begun(builder)
    orders = [asyncio.create_task(builder.cancel("b")) for _ in range(2)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert not any(order.done() for order in orders)
    go_on.set()
    await asyncio.gather(*orders)
    assert cleared == [True]
    for end in ends:
        os.close(end)


async def test_results_that_nobody_collects_do_not_pile_up(builder: Builder, jail: Jail) -> None:
    jail.end.set()
    for number in range(80):
        for end in await begun(builder, BuildRequest(f"b{number}", "image", "1", [], 0, {})):
            os.close(end)
        await asyncio.wait([builder._builds[f"b{number}"].task])
    assert len(builder._builds) <= 65


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull), (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFull),
        (OSError(errno.EMFILE, "Too many open files"), Unavailable), (executors.Overdue("rmtree has not ended"), Unavailable),
        (subprocess.CalledProcessError(1, "nft"), Unavailable),
    ],
)  # fmt: skip
async def test_what_the_host_refuses_a_build_has_its_kind(builder: Builder, jail: Jail, error: Exception, kind: type[VmmError]) -> None:
    jail.result = error
    jail.end.set()
    ends = await begun(builder)
    with pytest.raises(kind):
        await builder.result("b")
    for end in ends:
        os.close(end)


async def test_a_build_that_cannot_begin_leaves_nothing(builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when its settings are written: its directory goes again."""
    for name in ("accounts", "work"):
        (tmp_path / "builds" / name).mkdir(parents=True)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(builder, "_log_in", full)
    ends = await begun(builder)
    with pytest.raises(DiskFull, match="no room for the build"):
        await builder.result("b")
    assert not list((tmp_path / "builds/work").iterdir()) and not list((tmp_path / "netns").iterdir())
    for end in ends:
        os.close(end)


async def test_what_cannot_be_cleared_away_keeps_nothing_else(builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("accounts", "work"):
        (tmp_path / "builds" / name).mkdir(parents=True)

    def stands(*_: object) -> None:
        raise executors.Overdue("it has not ended")

    monkeypatch.setattr(builder, "_log_in", lambda *_: 1 / 0)
    monkeypatch.setattr(builder._cgroups, "remove", stands)
    ends = await begun(builder)
    with pytest.raises(ZeroDivisionError):
        await builder.result("b")
    assert not list((tmp_path / "builds/work").iterdir())
    for end in ends:
        os.close(end)


async def test_what_could_not_be_cleared_away_goes_later_and_hinders_no_build(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stayed until the daemon's next start: gigabytes, and a build that was begun again failed because of it."""
    for name in ("accounts", "work"):
        (tmp_path / "builds" / name).mkdir(parents=True)
    monkeypatch.setattr(builder, "_log_in", lambda *_: 1 / 0)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(builds.shutil, "rmtree", lambda *_, **__: None)
            patch.setattr(builds, "destroy_namespace", lambda path: path.touch())
            for end in await begun(builder):
                os.close(end)
            with pytest.raises(ZeroDivisionError):
                await builder.result("b")
    left = [*(tmp_path / "builds/work").iterdir(), *(tmp_path / "netns").iterdir()]
    assert len(left) == 3
    builder.trim()
    assert builder._trimming is not None
    await builder._trimming
    assert not [path for path in left if path.exists()]


def made(out: Path, config: bytes) -> None:
    out.mkdir()
    for name, data in (("disk.raw", b"disk"), ("code_bytes", b"12\n"), ("config.json", config)):
        (out / name).write_bytes(data)


def test_a_configuration_without_bound_is_refused_in_one_line(builder: Builder, tmp_path: Path) -> None:
    """It was sent as it was: more than a frame takes, and control's connection was closed, with everybody's calls."""
    made(tmp_path / "out", b'{"Labels":{"a":"' + b"x" * (5 << 20) + b'"}}')
    result = builder._collect(tmp_path / "out", tmp_path / "image")
    assert result.status == 1 and result.config == ""
    assert result.reason == f"the image's configuration (ENV, LABEL, ...) has {(5 << 20) + 19} bytes: {4 << 20} are taken"
    made(tmp_path / "small", b'{"Cmd":["/app"]}')
    assert builder._collect(tmp_path / "small", tmp_path / "image") == BuildResult(0, '{"Cmd":["/app"]}', False, False)
    assert (tmp_path / "image/code_bytes").read_text() == "12\n"


async def test_a_process_that_has_ended_is_not_killed_by_its_number() -> None:
    process = await asyncio.create_subprocess_exec("true")
    child = Child(process)
    await child.wait()
    child.kill()
    process = await asyncio.create_subprocess_exec("sleep", "60")
    child = Child(process)
    child.kill()
    assert await child.wait() == -9
    child.kill()


# ---- what does not grow for ever ----


def test_ids_that_images_named_once_are_free_again(tmp_path: Path) -> None:
    """With 256 of them an account could never build with another one again, for as long as it builds at all."""
    stores = Stores(tmp_path, FIRST)
    store, first, _ = stores.open("a", list(range(2_000_000, 2_000_256)))
    (store / "layer").touch()
    again, same, single = stores.open("a", [3_000_000])
    assert single == [3_000_000] and (again, same) == (store, FIRST + RANGE) and not (store / "layer").exists(), "layers have owners"
    stores.sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert first == FIRST and Stores(tmp_path, FIRST).open("b", [])[1] == FIRST
    with pytest.raises(VmmError, match="the image names 257 user ids beyond a million: 256 are mapped"):
        stores.open("a", list(range(4_000_000, 4_000_257)))


async def test_a_full_disk_gets_back_what_is_only_a_cache(builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store that was used longest ago first, one at a time; never one that a build uses or is about to use."""
    builder._settings = dataclasses.replace(builder._settings, room_bytes=1 << 30)
    stores = builder._stores
    for age, name in enumerate(("new", "old", "older", "busy", "begins")):
        stores.open(name, [])
        os.utime(tmp_path / "builds/accounts" / name / "users", (time.time() - 3600 * age,) * 2)
    os.utime(tmp_path / "builds/accounts/begins/users")
    builder._one_at_a_time["busy"] = asyncio.Lock()
    await builder._one_at_a_time["busy"].acquire()
    free = [1 << 40]
    monkeypatch.setattr(builds, "disk_free_bytes", lambda path: free[0])

    async def left() -> set[str]:
        builder.trim()
        assert builder._trimming is not None
        await builder._trimming
        return {path.name for path in (tmp_path / "builds/accounts").iterdir()}

    assert len(await left()) == 5
    free[0] = (1 << 30) - 1
    assert await left() == {"new", "old", "busy", "begins"}
    assert await left() == {"new", "busy", "begins"}
    assert await left() == {"new", "busy", "begins"} == await left()
