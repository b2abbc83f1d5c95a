"""Where memory control groups of the service's own processes are made, and why none are: hierarchies of files stand in for the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway import own_walls
from gateway.cli import host
from gateway.config import Settings
from vmm import cgroups, own_groups
from vmm.own_groups import OwnGroups


def group(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in ({"cgroup.controllers": "memory", "cgroup.subtree_control": "", "cgroup.procs": ""} | files).items():
        (path / name.replace("_bound", ".max")).write_text(text)
    return path


@pytest.fixture
def unified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """On a host without systemd; this process is in the group `unit`."""
    root = group(tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "ROOT", root)
    monkeypatch.setattr(cgroups, "SYSTEMD", tmp_path / "none")
    monkeypatch.setattr(cgroups, "own_group", lambda: root / "unit")
    group(root / "unit", memory_bound="max\n")
    return root


def test_in_the_unified_hierarchy_each_has_one_with_its_bound(unified: Path) -> None:
    group(unified / "torpor-x.own")
    one = OwnGroups("x")
    assert one.why_not == ""
    assert str(unified / "torpor-x.own/control/cgroup.procs") in one.enter("control", 5 << 20)
    assert (unified / "torpor-x.own/control/memory.max").read_text() == str(5 << 20)
    assert (unified / "cgroup.subtree_control").read_text() == (unified / "torpor-x.own/cgroup.subtree_control").read_text() == "+memory"


def test_with_systemd_they_are_made_where_it_delegates(unified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "none").mkdir()
    assert "Delegate=" in OwnGroups("x").why_not
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"1" if path == unified / "unit" else b"")
    one = OwnGroups("x")
    assert one.why_not == "" and one._base == unified / "unit/torpor-x.own"


def test_nobody_leaves_a_group_with_a_bound(unified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (unified / "unit/memory.max").write_text(f"{1 << 30}\n")
    assert "has a bound of its own" in OwnGroups("x").why_not
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"1" if path == unified / "unit" else b"")
    assert OwnGroups("x").why_not == "", "below it, it goes on to count"


@pytest.mark.parametrize(("bound", "why"), [(9223372036854771712, ""), (1 << 30, "has a bound of its own")])
def test_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int, why: str) -> None:
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(own_groups, "_own_v1", lambda: "container/of ours")
    assert OwnGroups("x").why_not == "there is no memory controller"
    group(tmp_path / "memory")
    group(tmp_path / "memory/container/of ours")
    (tmp_path / "memory/container/memory.limit_in_bytes").write_text(f"{bound}\n")
    one = OwnGroups("x")
    assert why in one.why_not and bool(why) is bool(one.why_not)
    if not why:
        one.enter("edge-0", 7 << 20)
        assert (tmp_path / "memory/torpor-x.own/edge-0/memory.limit_in_bytes").read_text() == str(7 << 20)


def test_doctor_says_what_bounds_them(unified: Path) -> None:
    settings = Settings.model_validate({"service": {"memory_mib": 800}})
    assert host._own_groups(settings) == (True, "800 MiB each, and 900 MiB with what they start, by control groups")
    (unified / "unit/memory.max").write_text("1000\n")
    well, text = host._own_groups(settings)
    assert well and text.startswith("800 MiB each by RLIMIT_DATA") and str(unified / "unit") in text


def test_vmm_which_holds_images_memory_leaves_what_the_host_keeps_back() -> None:
    settings = Settings.model_validate({"service": {"memory_mib": 64}, "limits": {"reserve_mib": 1024}})
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert own_walls.group_bound("vmm", settings) in (host_bytes - (1 << 30), host_bytes // 2)
