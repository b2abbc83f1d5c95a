"""Layer stores: one for each account, with ids that no other has; and where BuildKit takes images from."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gateway.messages import BuildRequest, BuildResult
from vmm import build_mirrors
from vmm.builds import RANGE, Builder, BuildSettings, Stores, canonical, id_maps, source_policy
from vmm.cgroups import Cgroups
from vmm.errors import VmmError

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
    with pytest.raises(VmmError, match="named 256 user ids"):
        stores.open("a", list(range(3_000_000, 3_000_255)))


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
    stores.drop_unused(30.0, {"busy"})
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
    request = BuildRequest("b", "image", "111111111111", "", "", [], 0, {})
    rescue = threading.Timer(1, os.read, (out, 1 << 20))  # of a loop that stands still
    rescue.start()
    begun = time.monotonic()
    running = asyncio.create_task(builder._run(request, tmp_path, log, os.dup(log)))
    await asyncio.sleep(0.01)
    assert time.monotonic() - begun < 0.9 and not running.done()
    rescue.cancel()
    os.read(out, 1 << 20)
    assert (await running).status == 124 and os.read(out, 99).endswith(b"torpor: the build took longer than 1800 s\n")
    os.close(out)


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


def test_every_tag_and_digest_is_converted_and_nothing_else() -> None:
    rules = source_policy((BASE,), False)["rules"]
    assert isinstance(rules, list)
    assert [rule["action"] for rule in rules] == ["DENY", "ALLOW", "CONVERT"]
    pattern = re.compile(rules[2]["selector"]["identifier"])
    name = "docker-image://public.ecr.aws/lambda/microvms"
    assert all(pattern.match(name + end) for end in (":latest", ":x@sha256:0a", "@sha256:0a", ""))
    assert not any(pattern.match(name + end) for end in ("-other:1", "/more:1", ":1/x"))
    assert [rule["action"] for rule in source_policy((), True)["rules"]] == []  # type: ignore[attr-defined]


def test_stores_of_buildah_go_at_the_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All accounts shared them; they were a cache."""
    for name in ("store/overlay", "runroot", "tmp/buildah-cache", "work/left", "settings"):
        (tmp_path / "builds" / name).mkdir(parents=True)
    monkeypatch.setattr(build_mirrors, "prepare", lambda directory: None)
    cgroups = Cgroups("builds-unit", tmp_path)
    settings = BuildSettings(tmp_path / "base.tar", tmp_path, tmp_path, (BASE,), False, FIRST)
    Builder(tmp_path / "builds", tmp_path / "netns", cgroups, settings).start()
    assert sorted(path.name for path in (tmp_path / "builds").iterdir()) == ["accounts", "settings", "work"]
    assert not list((tmp_path / "builds/work").iterdir())
