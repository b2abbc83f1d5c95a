"""Where control groups are made, what is said when they cannot limit, and who is in them: hierarchies of files stand in for the kernel's."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vmm import cgroups as module
from vmm import jail
from vmm.cgroups import Cgroups, Limits, NotLimited

LIMITS = Limits(memory_bytes=1 << 30, cpus=2, weight=100, pids=256, io_bytes_per_second=1 << 20)


def group(path: Path, *, controllers: str = "cpu io memory pids", enabled: str = "", processes: str = "", is_root: bool = False) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in (("cgroup.controllers", controllers), ("cgroup.subtree_control", enabled), ("cgroup.procs", processes)):
        (path / name).write_text(text)
    if not is_root:
        (path / "cgroup.type").write_text("domain")
    return path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unified hierarchy's, on a host without systemd; this process is in the group `unit`."""
    made = group(tmp_path / "cgroup", is_root=True)
    monkeypatch.setattr(module, "ROOT", made)
    monkeypatch.setattr(module, "SYSTEMD", tmp_path / "none")
    monkeypatch.setattr(module, "own_group", lambda: made / "unit")
    monkeypatch.setattr(module, "disk_number", lambda path: "8:0")
    group(made / "unit", processes="11\n12\n")
    return made


def delegate(monkeypatch: pytest.MonkeyPatch, *groups: Path) -> None:
    def getxattr(path: Path, name: str) -> bytes:
        if path in groups and name == "trusted.delegate":
            return b"1"
        raise OSError

    monkeypatch.setattr(os, "getxattr", getxattr)


def test_groups_lie_below_the_one_that_was_delegated(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A group that has been given to a manager is its own; elsewhere it may be undone at any time (systemd's CGROUP_DELEGATION)."""
    delegate(monkeypatch, root / "unit")
    one = Cgroups("x", tmp_path)
    assert one.joins("vm") == [root / "unit/torpor-x/vm/cgroup.procs"] and one.relative("vm") == "unit/torpor-x/vm"
    group(root / "unit/torpor-x")
    one.start()
    assert (root / "unit/cgroup.subtree_control").read_text() == "+memory +cpu +io +pids"
    assert (root / "unit/others/cgroup.procs").read_text() == "12", "the kernel allows no process in a group whose children are limited"
    monkeypatch.setattr(module, "own_group", lambda: root / "unit/others")
    assert Cgroups("x", tmp_path).joins("vm") == one.joins("vm"), "also for who was moved"


def test_without_a_delegation_they_lie_below_the_root(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    delegate(monkeypatch)
    assert Cgroups("x", tmp_path).joins("vm") == [root / "torpor-x/vm/cgroup.procs"]


def test_a_place_that_cannot_limit_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It was suppressed once, and microVMs ran without limits, of which doctor said that they were there."""
    delegate(monkeypatch, root / "unit")
    group(root / "unit/torpor-x")
    write = Path.write_text

    def busy(self: Path, text: str, encoding: str | None = None) -> int:
        if self == root / "unit/cgroup.subtree_control":
            raise OSError(16, "Device or resource busy")
        return write(self, text, encoding)

    monkeypatch.setattr(Path, "write_text", busy)
    with pytest.raises(NotLimited, match=r"unit/cgroup\.subtree_control: Device or resource busy"):
        Cgroups("x", tmp_path).start()


def test_a_limit_that_cannot_be_set_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    delegate(monkeypatch)
    one = Cgroups("x", tmp_path)
    (root / "torpor-x/vm/memory.max").mkdir(parents=True)
    with pytest.raises(NotLimited, match=r"vm/memory\.max: Is a directory"):
        one.create("vm", LIMITS)


def test_problems_are_those_of_the_place(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    delegate(monkeypatch)
    one = Cgroups("x", tmp_path)
    assert one.problems() == []
    group(root / "torpor-x", enabled="memory cpu pids")
    assert one.problems() == [f"io is not enabled in {root / 'torpor-x'}"]
    (root / "cgroup.controllers").write_text("cpu memory pids")
    assert one.missing == ["io"] and one.problems() == []
    monkeypatch.setattr(module, "_is_sealed", lambda directory: True)
    assert Cgroups("y", tmp_path).problems() == [f"{root} is mounted read-only"]


def test_where_systemd_runs_microvms_have_a_scope_of_their_own(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the service's unit they would end with it, or keep it from being started again."""
    monkeypatch.setattr(module, "SYSTEMD", tmp_path)
    monkeypatch.setattr(module, "own_group", lambda: root / "system.slice/torpor.service")
    scope = root / "system.slice/torpor-x-microvms.scope"
    asked: list[list[str]] = []

    def systemd(command: list[str], **_: object) -> None:
        asked.append(command)
        group(scope, processes="77\n")

    monkeypatch.setattr(subprocess, "Popen", systemd)
    one = Cgroups("x", tmp_path)
    one.start()
    assert asked[0][:2] == ["systemd-run", "--scope"] and "Before=torpor.service" in asked[0] and "Delegate=yes" in asked[0]
    assert (scope / "holder/cgroup.procs").read_text() == "77"
    assert (scope / "cgroup.subtree_control").read_text() == "+memory +cpu +io +pids"
    assert one.joins("vm") == [scope / "vm/cgroup.procs"] and one.names() == []
    Cgroups("x", tmp_path).start()
    assert len(asked) == 1, "it is there"


@pytest.fixture
def scope(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, list[list[str]]]:
    """Where systemd makes the instance's scope, and what was run to have it held."""
    monkeypatch.setattr(module, "SYSTEMD", tmp_path)
    path, asked = root / "system.slice/torpor-x-microvms.scope", list[list[str]]()

    def run(command: list[str], **_: object) -> None:
        asked.append(command)
        if command[0] == "systemd-run":
            group(path, processes="77\n")
        else:
            (path / "holder/cgroup.procs").write_text("78\n")

    monkeypatch.setattr(subprocess, "Popen", run)
    return path, asked


def test_a_scope_that_has_ended_is_made_again(scope: tuple[Path, list[list[str]]], tmp_path: Path) -> None:
    """It ends with its last process, by an operator's hand or for want of memory: every launch failed from then on, until a restart."""
    path, asked = scope
    one = Cgroups("x", tmp_path)
    one.start()
    shutil.rmtree(path)
    one.create("vm", LIMITS)
    assert len(asked) == 2 and (path / "vm/pids.max").read_text() == "256"


def test_a_scope_whose_holder_is_gone_is_held_again_while_microvms_run(scope: tuple[Path, list[list[str]]], tmp_path: Path) -> None:
    """systemd makes none beside it: no start of the service succeeded until the last microVM had ended."""
    path, asked = scope
    Cgroups("x", tmp_path).start()
    for file, text in (("cgroup.procs", ""), ("holder/cgroup.procs", ""), ("cgroup.events", "populated 1\nfrozen 0\n")):
        (path / file).write_text(text)
    Cgroups("x", tmp_path).start()
    assert len(asked) == 2 and asked[1][-2:] == ["sleep", "infinity"] and str(path / "holder/cgroup.procs") in asked[1]


def test_systemd_is_asked_again_while_the_scope_of_before_ends(
    scope: tuple[Path, list[list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is gone, systemd-run fails: "Unit … was already loaded"."""
    answers = iter([1, 1])

    class Refused:
        def poll(self) -> int:
            return next(answers)

    run, tries = subprocess.Popen, iter([Refused(), Refused()])
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **named: next(tries, None) or run(*words, **named))
    Cgroups("x", tmp_path).start()
    assert (scope[0] / "holder/cgroup.procs").read_text() == "77"


def test_a_scope_that_systemd_does_not_make_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "SYSTEMD", tmp_path)
    monkeypatch.setattr(module, "_SCOPE_SECONDS", 0.01)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: None)
    with pytest.raises(NotLimited, match=r"systemd made no torpor-x-microvms\.scope"):
        Cgroups("x", tmp_path).start()


def test_all_processes_of_a_microvm_are_in_its_group(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The parent that unshare(1) leaves too: it was in the service's group, ended with it, and took the hypervisor along."""
    delegate(monkeypatch)
    (root / "torpor-x/vm").mkdir(parents=True)
    enter = Cgroups("x", tmp_path).enter("vm")
    done = subprocess.run([*enter, "sh", "-c", "echo $$"], capture_output=True, text=True, timeout=10, check=True)
    assert (root / "torpor-x/vm/cgroup.procs").read_text() == done.stdout
    command = jail.command(Path("/root"), enter, 1, False, ["hypervisor"])
    assert command[: len(enter)] == enter and command[len(enter)] == "unshare"
    (root / "torpor-x/vm/cgroup.procs").unlink()
    (root / "torpor-x/vm").rmdir()
    assert subprocess.run([*enter, "true"], capture_output=True, timeout=10, check=False).returncode, "never outside of it"


def test_what_is_left_in_a_group_ends_by_the_kernels_own_list(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A number that was read may be another process's when the signal is sent."""
    delegate(monkeypatch)
    left = group(root / "torpor-x/vm", processes="1\n")
    (left / "cgroup.kill").write_text("")
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    monkeypatch.setattr(module, "_REMOVE_SECONDS", 0.01)
    Cgroups("x", tmp_path).remove("vm")
    assert (left / "cgroup.kill").read_text() == "1" and not killed
    (left / "cgroup.kill").unlink()
    Cgroups("x", tmp_path).remove("vm")
    assert set(killed) == {1}


def test_a_group_that_cannot_be_read_for_a_moment_is_removed_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1 has a directory for each controller: the trouble of one once left all that came after it, for good."""
    for controller in ("memory", "pids"):
        group(tmp_path / controller, is_root=True)
        (tmp_path / controller / "torpor-x/vm").mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    one = Cgroups("x", tmp_path)
    remove, troubles = Path.rmdir, iter([OSError(errno.EBUSY, "busy"), OSError(errno.EBUSY, "busy")])

    def rmdir(path: Path) -> None:
        for trouble in troubles:
            raise trouble
        remove(path)

    def kill(_: object, path: Path) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path / "cgroup.procs"))

    monkeypatch.setattr(Path, "rmdir", rmdir)
    monkeypatch.setattr(Cgroups, "_kill", kill)
    one.remove("vm")
    assert not list(tmp_path.glob("*/torpor-x/vm"))


def test_groups_that_are_left_under_one_controller_go_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for controller in ("memory", "pids"):
        group(tmp_path / controller, is_root=True)
        (tmp_path / controller / "torpor-x").mkdir()
    (tmp_path / "pids/torpor-x/vm").mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert Cgroups("x", tmp_path).names() == ["vm"]
    Cgroups("x", tmp_path).close()
    assert not list(tmp_path.glob("*/torpor-x"))
