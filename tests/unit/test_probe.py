"""Probing for KVM, without KVM: when it is asked again, what it says of a hypervisor that ended, how long it waits."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.config import Settings
from vmm import assets, jail, making, probe
from vmm.firecracker.jail import Programs
from vmm.qemu import machine as topology
from vmm.qemu import roots

SPEAKS = "echo 'init 0.042: a guest'\\''s init runs'"


def ran(script: str, seconds: float = 20.0) -> str:
    return probe.run(["/bin/sh", "-c", script], [], seconds)


# ---- one run ----


def test_a_guest_that_speaks_is_proof_and_is_ended() -> None:
    started = time.monotonic()
    assert ran(f"{SPEAKS}; sleep 60 & sleep 60") == ""
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            "echo 'SeaBIOS'; echo 'Could not access KVM kernel module: Permission denied' >&2; exit 1",
            "no guest ran: Could not access KVM kernel module: Permission denied",
        ),
        ("echo 'Kernel panic - not syncing: Attempted to kill init!'; exit 0", "no guest ran: Kernel panic - not syncing: Attempted to kill init!"),
        ("exit 7", "no guest ran: its hypervisor ended with code 7"),
    ],
)  # fmt: skip
def test_a_hypervisor_that_ends_is_quoted(script: str, why: str) -> None:
    assert ran(script) == why


def test_a_guest_that_is_silent_is_given_up_at_the_deadline() -> None:
    assert ran("echo 'KVM: entry failed, hardware error 0x80000021' >&2; sleep 60", 0.3) == (
        "no guest's init ran within 0.3 s: KVM: entry failed, hardware error 0x80000021"
    )


def test_nothing_of_a_run_is_left(tmp_path: Path) -> None:
    """Neither of one that speaks nor of one that is given up: what its processes left running is ended with them."""
    for script in (f"sleep 60 & echo $! > {tmp_path}/pid; {SPEAKS}; wait", f"sleep 60 & echo $! > {tmp_path}/pid; wait"):
        ran(script, 1.0)
        pid = int((tmp_path / "pid").read_text())
        deadline = time.monotonic() + 10
        with contextlib.suppress(OSError):  # it is gone, or waits for whoever reaps it, its parent being gone
            while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z":
                assert time.monotonic() < deadline


def test_a_command_that_is_not_there_is_a_reason() -> None:
    why = probe.run(["/nonexistent/jailer"], [], 20.0)
    assert why == "no guest ran: setpriv: failed to execute /nonexistent/jailer: No such file or directory"


# ---- what is remembered ----


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """With all that a probe needs, and a device that this test's user may change."""
    for name in ("kernel/vmlinuz", "initrd", f"qemu-root{topology.BINARY}"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("kernel", "initrd", "qemu-root"):
        making.key_path(tmp_path / name).write_text("made")
    return Settings(cache=tmp_path, root=tmp_path, users={"first": 700_000})


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A node of its own where the test may make one."""
    if os.geteuid():
        pytest.skip("only root makes device nodes")
    path = tmp_path / "kvm-device"
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], float]]:
    """Each run's command and deadline."""
    runs: list[tuple[list[str], float]] = []

    def run(command: list[str], descriptors: list[int], seconds: float) -> str:
        runs.append((command, seconds))
        return f"answer {len(runs)}"

    monkeypatch.setattr(probe, "run", run)
    return runs


def test_the_jail_is_asked_as_a_user_of_its_own(settings: Settings, device: Path, asked: list[tuple[list[str], float]]) -> None:
    probe.why_not_kvm(settings, device)
    command, seconds = asked[0]
    jailed = command.index("--reuid=896607")
    assert command == jail.command(
        settings.cache / "qemu-root", [], settings.users.probe, True, command[command.index("--pdeathsig=KILL") + 1 :]
    )
    assert command[jailed:].count("-accel") == 1 and "kvm" in command[jailed:] and seconds == settings.probe_seconds
    assert settings.users.probe > settings.users.machines


def test_an_answer_is_kept_until_something_that_it_depends_on_changes(
    settings: Settings, device: Path, asked: list[tuple[list[str], float]], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def answer(**changed: float) -> str:
        return probe.why_not_kvm(settings.model_copy(update=changed), device)

    assert answer() == answer() == "answer 1"
    device.chmod(0o660)
    assert answer() == answer() == "answer 2"
    os.chown(device, 0, 107)
    assert answer() == answer() == "answer 3"
    for count, name in enumerate((f"qemu-root{topology.BINARY}", "kernel/vmlinuz", "initrd"), 4):
        (settings.cache / name).write_text("another")
        assert answer() == answer() == f"answer {count}", name
    assert answer(probe_seconds=60.0) == "answer 7" and answer() == "answer 8"
    device.unlink()
    os.mknod(device, stat.S_IFCHR | 0o660, os.makedev(1, 5))
    assert answer() == answer() == "answer 9"
    os.mknod(settings.cache / "loaded-again", stat.S_IFCHR | 0o660, os.makedev(1, 5))
    (settings.cache / "loaded-again").rename(device)
    assert answer() == "answer 10"


def test_firecrackers_answer_is_of_the_file_system_that_its_jails_are_on(
    settings: Settings, device: Path, asked: list[tuple[list[str], float]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its jailer makes device nodes there, which a mount that is nodev does not open; and instances with other roots share the cache."""
    programs = Programs(tmp_path / "firecracker", tmp_path / "jailer")
    for path in (programs.firecracker, programs.jailer):
        path.touch()
    monkeypatch.setattr(probe, "firecracker_programs", lambda: programs)
    monkeypatch.setattr(probe, "wrong_release", lambda programs, oldest: "")
    for name in ("vmlinux", "initrd-firecracker"):
        (settings.cache / name).touch()
        making.key_path(settings.cache / name).write_text("made")

    def answer(root: Path) -> str:
        return probe.why_not_firecracker(settings.model_copy(update={"root": root}), device)

    other = tmp_path / "other"
    other.mkdir()
    assert answer(tmp_path) == answer(other) == "answer 1"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nodev", "other", other], check=True)
    try:
        assert answer(other) == answer(other) == "answer 2"
        subprocess.run(["mount", "-o", "remount,dev", other], check=True)
        assert answer(other) == "answer 3"
    finally:
        subprocess.run(["umount", other], check=True)


def test_half_an_answer_is_none(settings: Settings, device: Path, asked: list[tuple[list[str], float]]) -> None:
    """The file of a write that was interrupted, of another version, of nothing that is text."""
    assert probe.why_not_kvm(settings, device) == "answer 1"
    memory = settings.cache / "kvm-probe"
    for number, content in enumerate((b"", memory.read_bytes()[:20], b"\xff\xfe\n", b"boot-id\n/dev/kvm is not there"), 2):
        memory.write_bytes(content)
        assert probe.why_not_kvm(settings, device) == f"answer {number}"
    assert sorted(path.name for path in settings.cache.glob("kvm-probe*")) == ["kvm-probe"]


def test_what_cannot_be_asked_is_said_and_not_remembered(settings: Settings, device: Path, asked: list[tuple[list[str], float]]) -> None:
    for name in ("qemu-root", "kernel", "initrd"):
        for part in (name, f"{name}.key"):  # what was ended in its middle has no key
            (settings.cache / part).rename(settings.cache / "away")
            assert probe.why_not_kvm(settings, device) == f"it can be probed once `torpor assets` has made {settings.cache / name}"
            (settings.cache / "away").rename(settings.cache / part)
    device.unlink()
    assert probe.why_not_kvm(settings, device) == f"{device} is not there"
    device.touch()
    assert probe.why_not_kvm(settings, device) == f"{device} is no device"
    assert not asked and not (settings.cache / "kvm-probe").exists()


def test_what_the_set_up_makes_is_all_that_a_probe_asks_for(
    settings: Settings, device: Path, asked: list[tuple[list[str], float]], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """By the steps of the set-up themselves, and the real root of the jail: a probe that waits for anything else is never run."""
    cache = settings.cache / "made"
    cache.mkdir()
    placeholders = {"kernel": "vmlinuz", "guest": "init", "qemu-root": ""}
    for step in assets._steps():

        def work(target: Path, name: str = step.name) -> None:
            if name == "qemu-root":
                roots.make(cache, target)
            elif placeholders.get(name):
                target.mkdir()
                (target / placeholders[name]).touch()
            else:
                target.touch()

        making.make(cache / step.name, step.key(cache), work)
    assert probe.why_not_kvm(settings.model_copy(update={"cache": cache}), device) == "answer 1"
