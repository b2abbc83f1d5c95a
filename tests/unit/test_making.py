"""What is made once per host: a step that was ended in its middle is made again, and nothing of it is trusted."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vmm import assets, base, kernel, making, syscalls


def written(text: str) -> object:
    return lambda target: target.write_text(text)


def test_what_is_made_has_a_key_and_nothing_beside_it(tmp_path: Path) -> None:
    making.make(tmp_path / "one", "key-1", written("first"))  # type: ignore[arg-type]
    assert (tmp_path / "one").read_text() == "first" and making.key_at(tmp_path / "one") == "key-1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "one.key"]


def test_a_directory_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for number in ("1", "2"):

        def work(target: Path, number: str = number) -> None:
            target.mkdir()
            (target / number).touch()

        making.make(tmp_path / "one", number, work)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["2"] and making.key_at(tmp_path / "one") == "2"


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    making.make(tmp_path / "one", "key-1", written("first"))  # type: ignore[arg-type]

    def fails(target: Path) -> None:
        target.write_text("half")
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        making.make(tmp_path / "one", "key-2", fails)
    assert (tmp_path / "one").read_text() == "first" and making.key_at(tmp_path / "one") == "key-1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "one.key"]


def test_no_file_without_a_key_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("of an earlier version")
    assert not making.key_at(tmp_path / "one")
    (tmp_path / "one").unlink()
    (tmp_path / "one.key").write_text("key-1")  # and no key without its file
    assert not making.key_at(tmp_path / "one")


def test_the_disk_has_the_content_before_its_name_and_the_name_before_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a file system may have a rename and not what was written before it, unless that was synced (rename(2), syncfs(2))."""
    making.make(tmp_path / "one", "key-1", written("first"))  # type: ignore[arg-type]
    seen = []

    def sync(path: Path) -> None:
        seen.append(((tmp_path / "one").read_text(), making.key_at(tmp_path / "one")))

    monkeypatch.setattr(syscalls, "sync_file_system", sync)
    making.make(tmp_path / "one", "key-2", written("second"))  # type: ignore[arg-type]
    assert seen == [("first", "key-1"), ("second", "")]


@pytest.mark.parametrize("step", range(1, 8))
def test_whoever_is_killed_at_a_call_that_changes_files_is_made_up_for(tmp_path: Path, step: int) -> None:
    """At each rename, removal and sync of a step that replaces an older result."""
    making.make(tmp_path / "one", "key-1", written("first"))  # type: ignore[arg-type]
    killed = multiprocessing.get_context("fork").Process(target=_killed_at, args=(tmp_path, step))
    killed.start()
    killed.join(20)
    assert killed.exitcode == (-signal.SIGKILL if step < 7 else 0), "the list of calls is not what it was"
    with making.alone(tmp_path):
        key = making.key_at(tmp_path / "one")
        assert key in ("", "key-1", "key-2")
        assert not key or (tmp_path / "one").read_text() == {"key-1": "first", "key-2": "second"}[key]
        making.make(tmp_path / "one", "key-2", written("second"))  # type: ignore[arg-type]
    assert (tmp_path / "one").read_text() == "second" and making.key_at(tmp_path / "one") == "key-2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "one", "one.key"]


def _killed_at(directory: Path, step: int) -> None:
    calls = 0

    def counted(work: object) -> object:
        def call(*arguments: object, **names: object) -> object:
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*arguments, **names)  # type: ignore[operator]

        return call

    for owner, name in ((Path, "rename"), (Path, "unlink"), (syscalls, "sync_file_system")):
        setattr(owner, name, counted(getattr(owner, name)))
    making.make(directory / "one", "key-2", written("second"))  # type: ignore[arg-type]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_unfinished_work_is_removed_and_mounts_below_it_first(tmp_path: Path) -> None:
    """Also what earlier versions left, whose names were their own. A mount is somebody else's files."""
    for name in (".new-12345678", "kernel.new", "tmpabcdefgh"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "initrd.new").touch()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    (tmp_path / ".new-12345678/mounted here").mkdir()
    subprocess.run(["mount", "--bind", tmp_path / "precious", tmp_path / ".new-12345678/mounted here"], check=True)
    with making.alone(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "precious"]
    assert (tmp_path / "precious/file").exists()
    assert not [point for point in syscalls.mount_points() if point.startswith(str(tmp_path))]


def test_only_one_process_makes_what_is_missing(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from vmm import making\nwith making.alone(Path(sys.argv[1])): print('in', flush=True)"
    with making.alone(tmp_path):
        other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.5)
    assert other.communicate(timeout=20)[0] == "in\n"


def keys(cache: Path) -> dict[str, str]:
    return {step.name: step.key(cache) for step in assets._steps()}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """As after a run that made everything."""
    for step in assets._steps():
        (tmp_path / step.name).mkdir() if step.name in ("kernel", "guest", "qemu-root") else (tmp_path / step.name).touch()
        (tmp_path / f"{step.name}.key").write_text(step.key(tmp_path))
    return tmp_path


def test_nothing_is_made_again_without_a_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "make", None)
    assets.make(cache, print)
    assert not any(assets.missing(cache).values())


def test_the_initramfs_is_made_again_for_another_list_of_modules(cache: Path) -> None:
    assert assets._initrd("initrd", kernel.MODULES).key(cache) == making.key_at(cache / "initrd")
    assert assets._initrd("initrd", (*kernel.MODULES, "vsock")).key(cache) != making.key_at(cache / "initrd")


def test_another_version_of_init_is_compiled_and_packed_whatever_its_files_dates(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone of an older version has newer files than a cache, or older ones."""
    made = []
    monkeypatch.setattr(kernel, "init_sources", lambda: [cache / "init.c"])
    (cache / "init.c").write_text("int main;")
    os.utime(cache / "init.c", (0, 0))
    monkeypatch.setattr(making, "make", lambda target, key, work: (made.append(target.name), (making.key_path(target)).write_text(key)))
    assets.make(cache, print)
    assert made == ["guest", "initrd"]


def test_the_base_is_made_again_for_another_dnf(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "dnf").mkdir()
    (cache / "dnf/dnf.py").write_text("#!/usr/bin/python3\n")
    monkeypatch.setattr(base, "CONFIG", cache)
    assert [name for name, is_missing in assets.missing(cache).items() if is_missing] == ["base.tar"]


def test_a_step_that_fails_is_said_in_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "initrd.key").unlink()

    def make(target: Path, key: str, work: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(making, "make", make)
    with pytest.raises(assets.AssetError, match=r"initrd: .*No space left on device"):
        assets.make(cache, print)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (subprocess.CalledProcessError(1, ["gcc"], stderr="mapper.c:1: fatal error\n"), "initrd: mapper.c:1: fatal error"),
        (subprocess.CalledProcessError(1, ["gcc"], stderr=b"mapper.c:1: fatal error\n"), "initrd: mapper.c:1: fatal error"),
        (subprocess.CalledProcessError(100, ["apt-cache", "dumpavail"]), "initrd: Command '['apt-cache', 'dumpavail']' returned non-zero exit status 100."),
        (subprocess.TimeoutExpired(["ldd"], 20), "initrd: Command '['ldd']' timed out after 20 seconds"),
    ],
)  # fmt: skip
def test_a_program_that_fails_in_a_step_is_quoted(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: subprocess.SubprocessError, said: str
) -> None:  # fmt: skip
    (cache / "initrd.key").unlink()

    def make(target: Path, key: str, work: object) -> None:
        raise error

    monkeypatch.setattr(making, "make", make)
    with pytest.raises(assets.AssetError) as failed:
        assets.make(cache, print)
    assert str(failed.value) == said


def test_a_cache_that_cannot_be_made_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(assets.AssetError, match=r"Not a directory: .*file/cache"):
        assets.make(tmp_path / "file/cache", print)


# ---- the guest's kernel follows its package ----


def test_a_newer_kernel_is_fetched_once_apt_has_heard_of_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(kernel, "available", lambda cache: "6.1-2")
    monkeypatch.setattr(making, "make", lambda target, key, work: (made.append(target.name), making.key_path(target).write_text(key)))
    assert assets.missing(cache)["kernel"]
    assets.make(cache, print)
    assert made == ["kernel", "initrd", "modules"]


def test_where_apt_knows_no_kernel_the_one_that_is_there_is_the_newest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "kernel/version").write_text(kernel.available(cache))
    monkeypatch.setattr(kernel, "available", lambda cache: "")
    assert not any(assets.missing(cache).values())


def test_a_newer_kernel_that_cannot_be_fetched_keeps_nobody_from_starting(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def away(target: Path, key: str, work: object) -> None:
        raise assets.AssetError("apt-get download: 404 Not Found")

    monkeypatch.setattr(kernel, "available", lambda cache: "6.1-2")
    monkeypatch.setattr(making, "make", away)
    assets.make(cache, said.append)
    assert said[-1] == "kernel: apt-get download: 404 Not Found; the one that is there goes on being used"
    making.key_path(cache / "kernel").unlink()
    with pytest.raises(assets.AssetError, match="kernel: apt-get download: 404"):
        assets.make(cache, said.append)


def test_apt_is_asked_again_when_its_lists_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists, answers = tmp_path / "lists", iter(("6.1-1", "6.1-2"))
    monkeypatch.setattr(kernel, "_LISTS", str(lists))
    monkeypatch.setattr(kernel, "_ask_apt", lambda: next(answers))
    assert kernel.available(tmp_path) == ""
    lists.mkdir()
    (lists / "Packages").write_text("old")
    assert kernel.available(tmp_path) == kernel.available(tmp_path) == "6.1-1"
    os.utime(lists / "Packages", (1, 1))
    assert kernel.available(tmp_path) == "6.1-2"


def test_an_apt_that_fails_knows_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> str:
        raise kernel.AssetError("apt-cache policy: No such file or directory: 'apt-cache'")

    monkeypatch.setattr(kernel, "_LISTS", str(tmp_path))
    monkeypatch.setattr(kernel, "_ask_apt", fails)
    assert kernel.available(tmp_path) == "" and not (tmp_path / "kernel.available").exists()
