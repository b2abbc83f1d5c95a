"""The leak check itself: one leak of each kind that it knows is planted on the host, found, and taken away again."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import host_state
import pytest
from namespaces import Namespace, namespace

from vmm.namespaces import destroy_namespace, make_namespace

pytestmark = pytest.mark.service
NAME = "torpor-planted"


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=20)


@contextlib.contextmanager
def process(tmp_path: Path) -> Iterator[str]:
    uid = str(host_state.TEST_UIDS[-1])
    child = subprocess.Popen(
        ["setpriv", f"--reuid={uid}", "--clear-groups", "sh", "-c", "echo up; read line"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None and child.stdout.readline()
        yield f"processes: {child.pid} sh"
    finally:
        child.communicate()


@contextlib.contextmanager
def program(tmp_path: Path) -> Iterator[str]:
    """A process of root's, known by the virtual environment that its program lies in."""
    child = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline()
        yield f"processes: {child.pid} "
    finally:
        child.communicate(b"\n")


@contextlib.contextmanager
def mount(tmp_path: Path) -> Iterator[str]:
    run("mount", "-t", "tmpfs", NAME, str(tmp_path))
    try:
        yield f"mounts: {tmp_path}"
    finally:
        run("umount", str(tmp_path))


@contextlib.contextmanager
def second_mount(tmp_path: Path) -> Iterator[str]:
    """Where something was mounted before."""
    run("mount", "-t", "tmpfs", NAME, "/dev/shm")
    try:
        yield "mounts: /dev/shm ("
    finally:
        run("umount", "/dev/shm")


@contextlib.contextmanager
def pinned_namespace(tmp_path: Path) -> Iterator[str]:
    make_namespace(tmp_path / "pinned", lambda: None)
    try:
        yield f"at {tmp_path}/pinned"
    finally:
        destroy_namespace(tmp_path / "pinned")


@contextlib.contextmanager
def held_namespace(tmp_path: Path) -> Iterator[str]:
    with namespace() as one:
        yield f"namespaces: {Path(one.path).readlink()} held"


@contextlib.contextmanager
def link(tmp_path: Path) -> Iterator[str]:
    run("ip", "link", "add", "tplanted0", "type", "veth", "peer", "name", "tplanted1")
    try:
        yield "links: tplanted0"
    finally:
        run("ip", "link", "del", "tplanted0")


@contextlib.contextmanager
def control_group(tmp_path: Path) -> Iterator[str]:
    parents = (Path(directory) for directory, _, files in os.walk("/sys/fs/cgroup") if "cgroup.procs" in files)
    group = next(parent for parent in parents if parent != Path("/sys/fs/cgroup/unified")) / NAME
    group.mkdir()
    try:
        yield f"control groups: {group}"
    finally:
        group.rmdir()


@contextlib.contextmanager
def table(tmp_path: Path) -> Iterator[str]:
    run("nft", "add", "table", "inet", "planted")
    try:
        yield "nft tables: table inet planted"
    finally:
        run("nft", "delete", "table", "inet", "planted")


@contextlib.contextmanager
def tables_that_nobody_can_list(tmp_path: Path) -> Iterator[str]:
    """What cannot be looked at is not taken for clean."""
    (tmp_path / "nft").write_text("#!/bin/sh\necho 'netlink: Error: cache initialization failed' >&2; exit 1\n")
    (tmp_path / "nft").chmod(0o755)
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{tmp_path}:{path}"
    try:
        yield "nft tables: netlink: Error: cache initialization failed"
    finally:
        os.environ["PATH"] = path


@contextlib.contextmanager
def file(tmp_path: Path) -> Iterator[str]:
    one = Path("/var/tmp") / NAME
    one.touch()
    try:
        yield f"files: {one}"
    finally:
        one.unlink()


@contextlib.contextmanager
def setting(tmp_path: Path) -> Iterator[str]:
    one = Path("/proc/sys/net/ipv4/ip_local_port_range")
    before = one.read_text()
    one.write_text("20000 60999")
    try:
        yield "settings: net/ipv4/ip_local_port_range is 20000"
    finally:
        one.write_text(before)


@contextlib.contextmanager
def setting_of_ipv6(tmp_path: Path) -> Iterator[str]:
    one = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
    if not one.exists():
        pytest.skip("this host has no IPv6")
    before = one.read_text()
    one.write_text("0" if before.strip() == "1" else "1")
    try:
        yield "settings: net/ipv6/conf/default/disable_ipv6 is "
    finally:
        one.write_text(before)


PLANTS: dict[str, list[Callable[[Path], AbstractContextManager[str]]]] = {
    "processes": [process, program], "mounts": [mount, second_mount], "namespaces": [pinned_namespace, held_namespace], "links": [link],
    "control groups": [control_group], "nft tables": [table, tables_that_nobody_can_list], "files": [file], "settings": [setting, setting_of_ipv6],
}  # fmt: skip


def test_every_kind_has_a_leak_here() -> None:
    assert PLANTS.keys() == host_state.KINDS.keys()


@pytest.mark.parametrize("plant", [plant for plants in PLANTS.values() for plant in plants], ids=lambda plant: plant.__name__)
def test_a_leak_is_found(plant: Callable[[Path], AbstractContextManager[str]], tmp_path: Path) -> None:
    before = host_state.snapshot()
    with plant(tmp_path) as planted:
        found = host_state.left(before, host_state.snapshot())
        assert [one for one in found if planted in one], found
    assert not [one for one in host_state.left(before, host_state.snapshot()) if planted in one]


def test_a_group_that_ends_while_they_are_listed_is_none_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torpor-one", "gone", "torpor-two"):
        (tmp_path / name).mkdir()
    scandir = os.scandir

    def remove_and_list(path: str) -> Iterator[os.DirEntry[str]]:
        if os.fspath(path).endswith("/gone"):
            os.rmdir(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", remove_and_list)
    assert set(host_state.groups(str(tmp_path))) == {f"{tmp_path}/torpor-one", f"{tmp_path}/torpor-two"}


def test_a_namespace_ends_with_its_last_descriptor() -> None:
    one = Namespace()
    own = str(os.stat(one.path).st_ino)  # others come and go meanwhile: the service under test makes links ahead
    assert any(own in found for found in host_state.snapshot()["namespaces"])
    one.close()
    assert not any(own in found for found in host_state.snapshot()["namespaces"])
