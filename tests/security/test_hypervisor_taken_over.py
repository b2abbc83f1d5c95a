"""The walls of a hypervisor's jail: what a guest finds that has taken its hypervisor over.

A stand-in under a hypervisor's name, in the real jail, tries each call of the list that Firecracker denies, and the host's files, processes
and sockets. Taken away by name: one of jail.WALLS, or two where the second one would hold.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.cli import security
from gateway.config import Settings
from vmm import calls, jail, sandboxes, syscalls
from vmm.driver import Process
from vmm.qemu import roots
from vmm.qemu.process import child_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a jail is root's to make")
UID = 700_000 + 3 * 65_536 - 2
SOURCE = Path(__file__).with_name("hypervisor.c")
PPOLL = "271"  # of x86-64
ALLOWED = {name for names in calls.ALLOWED.values() for name in names.split()}
CONTROLS = {"getpid": "done", "later call": f"errno {errno.ENOSYS}"}
# Of which a kernel can be built without: there is nothing to reach then.
BUILT = {
    "x32", "init_module", "finit_module", "delete_module", "kexec_load", "acct", "quotactl", "memfd_secret", "modify_ldt", "kcmp", "bpf",
    "add_key", "request_key", "keyctl", "perf_event_open", "mq_open", "swapon", "userfaultfd", "io_uring_setup", "iopl", "ioperm",
}  # fmt: skip

Try = Callable[..., str]


@pytest.fixture(scope="module")
def hypervisors() -> Path:
    """The root that `make assets` makes, with this tree's filter, as vmm has it from its start on."""
    found = (Settings().cache / "qemu-root").resolve()
    if not found.is_dir():
        pytest.skip("`make assets` has not been run")
    roots.fit(found)
    return found


@pytest.fixture(scope="module")
def attempt(tmp_path_factory: pytest.TempPathFactory, hypervisors: Path) -> Iterator[Try]:
    """Runs the stand-in in a copy of the hypervisors' root; returns what it printed, or by which signal it ended."""
    root = tmp_path_factory.mktemp("jail") / "root"
    for parent in (root.parent, *root.parent.parents):
        if parent.stat().st_uid == 0 and str(parent) != "/":
            parent.chmod(parent.stat().st_mode | 0o011)
    shutil.copytree(hypervisors, root, symlinks=True)
    jail.make_mapper(root)
    program = root / "usr/bin/qemu-system-stand-in"
    subprocess.run(["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program, SOURCE], check=True, timeout=60)

    def run(*words: str, without: tuple[str, ...] = (), more: tuple[int, ...] = ()) -> str:
        inside = str(program) if jail.ROOT in without else "/usr/bin/qemu-system-stand-in"
        command = jail.command(root, [], UID, False, [inside, *words], without)
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False, env={"PATH": jail.PATH}, cwd="/",
            pass_fds=more,
        )  # fmt: skip
        return done.stdout.strip() if done.returncode >= 0 else signal.Signals(-done.returncode).name

    yield run
    shutil.rmtree(root)


def test_no_call_that_it_has_no_use_for_reaches_the_kernel(attempt: Try) -> None:
    """With the positive control in the same walk: the filter taken out, each call comes so far that the kernel looks at what it is told."""
    names = attempt("names").splitlines()
    assert len(names) > 55
    for name in names:
        kept, let = attempt(name), attempt(name, without=(jail.CALLS,))
        if name in CONTROLS:
            assert kept == CONTROLS[name] == let, name
            continue
        assert kept == ("SIGSYS" if name.split()[0] not in calls.ANSWERED.split() else f"errno {errno.ENOSYS}"), name
        assert let == "done" or let.startswith("errno"), name
        assert let != f"errno {errno.ENOSYS}" or name in BUILT, f"{name} is none of this kernel's: the wall was not needed"


def test_neither_does_one_by_another_way_of_calling(attempt: Try) -> None:
    assert attempt("32 bits") == "SIGSYS"
    assert attempt("32 bits", without=(jail.CALLS,)) in ("done", f"errno {errno.ENOSYS}", "SIGSEGV"), "as the kernel has it, or has it not"


def test_nothing_of_the_list_starts_a_program_or_opens_another_process() -> None:
    never = {
        "execve", "execveat", "fork", "vfork", "clone", "ptrace", "process_vm_readv", "process_vm_writev", "bpf", "mount", "setns",
        "unshare", "keyctl", "add_key", "perf_event_open", "pidfd_getfd", "pidfd_open", "open_by_handle_at", "kcmp", "setuid", "socket",
    }  # fmt: skip
    assert not never & ALLOWED


def test_the_hosts_files_are_not_there(attempt: Try, tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == 0 and str(parent) != "/":
            parent.chmod(parent.stat().st_mode | 0o011)
    tmp_path.chmod(0o777)
    (tmp_path / "other").write_text("another's snapshot")
    os.chmod(tmp_path / "other", 0o644)
    for what, place in (("read", tmp_path / "other"), ("write", tmp_path / "new"), ("read", Path("/etc/passwd"))):
        assert attempt(what, str(place)) == f"errno {errno.ENOENT}"
        assert attempt(what, str(place), without=(jail.ROOT,)) == "done"
    assert attempt("write", "/usr/new") == f"errno {errno.EROFS}", "its own root is no place to leave anything"


def test_neither_are_its_processes(attempt: Try) -> None:
    """One of the same user runs beside it, as if another microVM had its number."""
    with subprocess.Popen(["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "sleep", "60"]) as other:
        try:
            assert attempt("processes") == "1"
            assert attempt("signal", str(other.pid)) == f"errno {errno.ESRCH}"
            assert attempt("signal", str(other.pid), without=("processes",)) == "done"
            assert int(attempt("processes", without=("processes", jail.ROOT))) > 2
        finally:
            other.kill()


def test_neither_are_its_links_and_sockets(attempt: Try) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0torpor-wall-{os.getpid()}")
        listener.listen()
        name = listener.getsockname()[1:].decode()
        assert attempt("abstract", name) == f"errno {errno.ENOSYS}"
        assert attempt("abstract", name, without=(jail.CALLS,)) == f"errno {errno.ECONNREFUSED}", "the second layer"
        assert attempt("abstract", name, without=(jail.CALLS, "network")) == "done"


def test_it_holds_what_it_was_given_and_nothing_else(attempt: Try) -> None:
    more = os.open("/dev/null", os.O_RDONLY)
    try:
        assert attempt("descriptors") == "3" and attempt("descriptors", more=(more,)) == "4"
    finally:
        os.close(more)


def test_it_is_nobody_and_stays_so(attempt: Try, tmp_path: Path) -> None:
    secret = tmp_path / "roots"
    secret.write_text("root's")
    secret.chmod(0o600)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == 0 and str(parent) != "/":
            parent.chmod(parent.stat().st_mode | 0o011)
    assert attempt("read", str(secret), without=(jail.ROOT,)) == f"errno {errno.EACCES}"
    assert attempt("read", str(secret), without=(jail.ROOT, "user")) == "done"
    assert attempt("setuid", without=(jail.CALLS,)) == f"errno {errno.EPERM}"
    assert attempt("setuid", without=(jail.CALLS, "user")) == "done"
    assert attempt("sethostname", without=(jail.CALLS, "user")) == f"errno {errno.EPERM}", "root without a capability"
    assert attempt("sethostname", without=(jail.CALLS, "user", "capabilities")) != f"errno {errno.EPERM}"


def test_what_stands_is_read_back_from_the_kernel(hypervisors: Path, tmp_path: Path) -> None:
    """An old kernel, or a program that does not know a flag, would leave a wall out in silence: such a hypervisor is not used."""
    idle = ["/usr/bin/qemu-system-x86_64", "-M", "none", "-S", "-nodefaults", "-nographic", "-sandbox", "on"]
    for without, said in (
        ((), ""),
        (("calls",), "calls"),
        (("root",), "root"),
        (("capabilities",), "capabilities"),
        (("network",), "network"),
        (("user",), "user"),
        (("privileges", "calls"), "calls"),
    ):
        with subprocess.Popen(
            jail.command(hypervisors, [], UID, False, idle, without), stdin=subprocess.DEVNULL, env={"PATH": jail.PATH}
        ) as process:
            try:
                pid = started(process.pid)
                assert jail.missing(pid, UID) == said, without
                says_what_stands(tmp_path, pid, {name for name in said.split(", ") if name})
            finally:
                process.kill()


def says_what_stands(run: Path, pid: int, missing: set[str]) -> None:
    """`torpor doctor --security` has each line of the kernel's: a wall that was taken out is named, with whom it is not around."""
    settings = Settings(run=run, name="walls")
    directory = settings.runtime / "vms/1-stand-in"
    directory.mkdir(parents=True, exist_ok=True)
    sandboxes.save_record(directory, Process("1-stand-in", pid, syscalls.start_time(pid) or 0, "image", UID))
    rows = list(security.jails(settings))
    assert {name for name, ok, _ in rows if not ok} == {f"jail: {name}" for name in missing}
    assert all(f"1-stand-in (process {pid})" in text if not ok else "read back of 1 that run" in text for _, ok, text in rows)
    sandboxes.save_record(directory, Process("1-stand-in", pid, 1, "image", UID))  # another process, of the same number
    assert all(ok and "none runs here" in text for _, ok, text in security.jails(settings))


def started(parent: int) -> int:
    """The hypervisor, once both filters are there, or it waits for orders."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid = child_of(parent)
        if pid and "qemu-system" in os.readlink(f"/proc/{pid}/exe") and Path(f"/proc/{pid}/syscall").read_text().split()[0] == PPOLL:
            return pid
        time.sleep(0.01)
    raise AssertionError("it did not start")
