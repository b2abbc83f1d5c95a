"""`make test-fresh`: the README's commands, as they stand there, on a machine that has seen nothing.

The machine is a Debian that mmdebstrap makes, in mount, PID, network, IPC, UTS and control group namespaces of its own, with a clone of
the last commit in it. Of the host it has the package sources, the certificates, and the device nodes that any machine has; its network is
slirp4netns. Needs root, and only what the Makefile's FRESH_PACKAGES name: no virtual environment.

    tests/fresh.py [--release NAME] [--odd] [--record | --recorded] [COMMAND...]

`--odd`: `make demo` and `make check` with /tmp mounted noexec, umask 077, a space in the clone's path, LANG=C and 1024 descriptors.
`--record` writes the result to .ci/fresh; `--recorded` prints what is there, and how many commits it is behind.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import host_state  # noqa: E402
from scratch import remove, scratch  # noqa: E402

from vmm import mirrors  # noqa: E402

PREFIX = "torpor-fresh-"
RECORD = REPO / ".ci/fresh"
NETWORK, NAME_SERVER = "10.0.77.0/24", "10.0.77.3"  # slirp4netns answers for the third address
CERTIFICATES = Path("usr/local/share/ca-certificates")
# What reaches package sources: variables of pip(1), of proxies and of certificates.
VARIABLES = re.compile(r"PIP_\w+|(?i:https?|no|all|ftp)_(?i:proxy)|(SSL|REQUESTS|CURL|GIT_SSL|NODE_EXTRA|AWS)_C\w+")
PIP_FILES = ("/etc/pip.conf", "/etc/xdg/pip", "/root/.config/pip", "/root/.pip")
DEVICES = (
    *("null", "zero", "full", "random", "urandom", "tty", "fuse", "net/tun", "kvm", "loop-control"),
    *(f"loop{number}" for number in range(8)),
)
RELEASE = "bookworm"
COMMAND_SECONDS = 3600
MOST_COMMITS = 500
ATTEMPTS = 3
# Where the demo keeps its instance (docs/operations.md).
EXPECTED = ("files: /var/lib/torpor-demo",)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# As a login has it; and both limits, which a process of root's could raise again, for all that do not.
USUAL, ODD = "umask 022; ulimit -S -n 1024; ", "umask 077; ulimit -n 1024; "
# $1 and on: files of control groups up to "--"; then the command.
_JOIN = 'while [ "$1" != -- ]; do echo $$ > "$1"; shift; done; shift; exec "$@"'
# Where Debian's tools keep what they know of packages, and the kernel's own file systems.
PACKAGES_PLACES = (
    "/dev",
    "/proc",
    "/sys",
    "/boot",
    "/usr",
    "/etc",
    "/var/lib/dpkg",
    "/var/lib/apt",
    "/var/cache/apt",
    "/var/cache/debconf",
    "/var/cache/ldconfig",
    "/var/log",
)
_MNT_DETACH = 2
_SYS_PIVOT_ROOT = 155 if os.uname().machine == "x86_64" else 41


def run(*command: str | Path, deadline: float = 600, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=deadline, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"test-fresh: {' '.join(map(str, command))[:200]}: {done.stderr.strip()[-2000:]}")
    return done  # type: ignore[no-any-return]


# ---- the machine's files ----


def make_root(root: Path, release: str) -> None:
    """A Debian with nothing but what is essential, make(1) and the authorities' certificates; and the host's package sources."""
    host = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    sources = root.with_name("host.sources")
    sources.write_text(re.sub(rf"\b{host[1] if host else release}\b", release, mirrors.host_sources(host[1] if host else release)))
    options = root.with_name("apt.conf")
    options.write_text(mirrors.apt_options())
    bootstrap = (
        "mmdebstrap", "--mode=root", "--variant=minbase", "--include=make,ca-certificates", f"--aptopt={options}",
        '--aptopt=Acquire::Retries "3"',
        release, root, sources,
    )  # fmt: skip
    for attempt in range(1, ATTEMPTS + 1):  # mirrors falter
        try:
            run(*bootstrap)
            break
        except SystemExit:
            remove(root)
            if attempt == ATTEMPTS:
                raise
    (root / "etc/hostname").write_text("fresh\n")
    (root / "etc/hosts").write_text("127.0.0.1\tlocalhost\n127.0.1.1\tfresh\n::1\tlocalhost ip6-localhost ip6-loopback\n")
    (root / "etc/resolv.conf").write_text(f"nameserver {NAME_SERVER}\n")


def lend_sources(root: Path) -> dict[str, str]:
    """Gives the machine the host's authorities and pip settings. Returns the variables that go with them."""
    for file in (Path("/") / CERTIFICATES).glob("**/*.crt"):
        copy = root / file.relative_to("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    run("chroot", root, "update-ca-certificates", env={"PATH": PATH})  # the host's TMPDIR, for one, is no directory there
    for name in PIP_FILES:
        source, copy = Path(name), root / name.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy)
        elif source.exists():
            shutil.copy(source, copy)
    return {name: value for name, value in os.environ.items() if VARIABLES.fullmatch(name)}


def indexes(root: Path, variables: dict[str, str]) -> list[Path]:
    """Directories of the host that its pip settings name as package sources."""
    files = [file for name in PIP_FILES for file in [Path(name), *Path(name).glob("*")] if file.is_file()]
    text = "\n".join([*(file.read_text() for file in files), *(value for name, value in variables.items() if name.startswith("PIP_"))])
    named = {Path(found) for found in re.findall(r"(?:(?<=file://)|(?<![\w:/.]))/[^\s\"',:]+", text)}
    # An index of links may point beside itself: its parent comes along.
    wanted = {path.parent if path.name == "simple" else path for path in named if path.is_dir()}
    return sorted(path for path in wanted if not (root / path.relative_to("/")).exists())


def clone(target: Path) -> str:
    """Returns the hash of the tree that is in it: the next commits may come while the machine runs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    run("git", "clone", "--quiet", "--no-hardlinks", REPO, target)
    return tree_hash(repo=target)


# ---- its namespaces ----


def hierarchies() -> dict[Path, tuple[str, str]]:
    """Mounted control group hierarchies: where, type, options (cgroups(7))."""
    found = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, options = line.split()[:4]
        if kind in ("cgroup", "cgroup2"):
            kept = [word for word in options.split(",") if word not in ("rw", "ro", "relatime", "nosuid", "nodev", "noexec", "xattr")]
            found[Path(where)] = (kind, ",".join(kept) if kind == "cgroup" else "")
    return found


def make_groups(name: str) -> list[Path]:
    """A control group for the machine in every hierarchy, below the one of this process where that is allowed (version 1)."""
    mine = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    made = []
    for where, (kind, options) in hierarchies().items():
        own = next((path for names, path in mine.items() if names and set(names.split(",")) <= set(options.split(","))), "/")
        group = where / (own.lstrip("/") if kind == "cgroup" else "") / name
        with contextlib.suppress(FileNotFoundError):
            (group.parent / "cgroup.clone_children").write_text("1") if "cpuset" in options.split(",") else None
        group.mkdir()
        made.append(group)
    return made


def remove_groups(groups: list[Path]) -> None:
    for group in groups:
        for directory, _, _ in os.walk(group, topdown=False):
            deadline = time.monotonic() + 5
            while os.path.isdir(directory):
                try:
                    os.rmdir(directory)
                except OSError:  # its processes are on their way out
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)


def connect(pid: int, exit_end: int) -> subprocess.Popen[bytes]:
    """Gives the namespace of `pid` a network that is slirp4netns's, until `exit_end` is closed."""
    ready_out, ready_in = os.pipe()
    process = subprocess.Popen(
        ["slirp4netns", "--configure", "--mtu=65520", f"--cidr={NETWORK}", "--disable-host-loopback", f"--ready-fd={ready_in}",
         f"--exit-fd={exit_end}", str(pid), "eth0"],
        pass_fds=[ready_in, exit_end], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    os.close(ready_in)
    word = os.read(ready_out, 1)
    os.close(ready_out)
    if not word:
        raise SystemExit("test-fresh: slirp4netns gave the machine no network")
    return process


def mount_all(root: Path, plan: dict[str, object]) -> None:
    """What a machine has mounted when somebody logs in."""

    def mount(kind: str, where: str, options: str = "") -> None:
        (root / where).mkdir(parents=True, exist_ok=True)
        run("mount", "-t", kind, *(["-o", options] if options else []), kind, root / where)

    run("mount", "--bind", root, root)
    mount("proc", "proc", "nosuid,nodev,noexec")
    mount("sysfs", "sys", "nosuid,nodev,noexec")
    groups = hierarchies()
    if any(kind == "cgroup" for kind, _ in groups.values()):
        run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", root / "sys/fs/cgroup")
    for where, (kind, options) in groups.items():
        mount(kind, str(where.relative_to("/")), options)
    if (root / "sys/fs/cgroup/cgroup.controllers").exists():
        # As systemd does: a group whose controllers its children shall have may hold no process itself (cgroups(7)).
        (root / "sys/fs/cgroup/init.scope").mkdir()
        (root / "sys/fs/cgroup/init.scope/cgroup.procs").write_text("0")
    mount("tmpfs", "dev", "mode=755,nosuid")
    for name in DEVICES:
        if (node := Path("/dev") / name).exists():
            found = node.stat()
            (root / "dev" / name).parent.mkdir(exist_ok=True)
            os.mknod(root / "dev" / name, stat.S_IFMT(found.st_mode), found.st_rdev)
            os.chown(root / "dev" / name, 0, found.st_gid)
            os.chmod(root / "dev" / name, stat.S_IMODE(found.st_mode))
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"), ("ptmx", "pts/ptmx")):
        (root / "dev" / name).symlink_to(target)
    mount("devpts", "dev/pts", "newinstance,ptmxmode=0666,mode=620,gid=5")
    mount("tmpfs", "dev/shm", "nosuid,nodev")
    mount("tmpfs", "run", "mode=755,nosuid,nodev")
    mount("tmpfs", "run/lock", "nosuid,nodev,noexec")
    (root / "run/mount").mkdir()  # where mount(8) keeps its notes, from the first mount of a boot on
    if plan["odd"]:
        mount("tmpfs", "tmp", "mode=1777,nosuid,nodev,noexec")
    for index in plan["indexes"]:  # type: ignore[attr-defined]
        where = root / str(index).lstrip("/")
        where.mkdir(parents=True, exist_ok=True)
        run("mount", "--bind", index, where)
        run("mount", "-o", "remount,bind,ro", where)


def pivot(root: Path) -> None:
    """This process's root is the machine's, and nothing of the host's files can be reached any more (pivot_root(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.chdir(root)
    if libc.syscall(_SYS_PIVOT_ROOT, b".", b".") or libc.umount2(b".", _MNT_DETACH):
        raise OSError(ctypes.get_errno(), "pivot_root")
    os.chdir("/")


# ---- what is done there ----


def own_files() -> set[str]:
    """Files and directories outside the places of the system's own."""
    found = set()
    for directory, names, files in os.walk("/"):
        here = [name for name in names if os.path.join(directory, name) not in PACKAGES_PLACES]
        names[:] = [name for name in here if not os.path.islink(os.path.join(directory, name))]
        found |= {os.path.join(directory, name) for name in (*here, *files)}
    return found


def new_files(before: set[str], clone: str) -> dict[str, int]:
    """What was made outside the clone since, and how many files are in it."""
    made = {name for name in own_files() - before if not name.startswith(f"{clone}/")}
    return {name: sum(other.startswith(f"{name}/") for other in made) for name in sorted(made) if os.path.dirname(name) not in made}


def others() -> list[str]:
    """Processes of the machine beside its first one."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if command and directory.name != str(os.getpid()):  # kernel threads and those that are over have none
                found.append(f"{directory.name} {command[:200]}")
    return found


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """As init does: orphans are waited for too. Ends what takes too long."""
    deadline = time.monotonic() + COMMAND_SECONDS
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == process.pid:
            return os.waitstatus_to_exitcode(status)
        if not pid:
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.05)


def inside(plan: dict[str, object]) -> None:
    """The machine's first process: makes its mounts, runs the commands, tells what came of each. A line of JSON for each command."""
    out = os.fdopen(int(str(plan["out"])), "w")
    sys.stdin.readline()  # until the network is there
    root, odd, place = Path(str(plan["root"])), bool(plan["odd"]), str(plan["clone"])
    mount_all(root, plan)
    run("hostname", "fresh")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
    pivot(root)
    environment = {
        "HOME": "/root", "USER": "root", "LOGNAME": "root", "SHELL": "/bin/bash", "TERM": "dumb",
        "PATH": PATH, "LANG": "C" if odd else "C.UTF-8",
        **plan["variables"],  # type: ignore[dict-item]
    }  # fmt: skip
    for command in plan["commands"]:  # type: ignore[attr-defined]
        print(f"test-fresh: $ {command}", flush=True)
        state, files, started = host_state.snapshot(), own_files(), time.monotonic()
        process = subprocess.Popen(
            ["/bin/sh", "-c", f"{ODD if odd else USUAL}{command}"], cwd=place, env=environment, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        status = wait_for(process)
        seconds = time.monotonic() - started
        found = host_state.left(state, host_state.snapshot())
        left = [one for one in found if one not in EXPECTED] + [f"process: {one}" for one in others()]
        out.write(json.dumps([command, seconds, status, left, new_files(files, place)]) + "\n")
        out.flush()
    out.close()


# ---- on the host ----


def readme_commands() -> list[str]:
    """The first lines of code that the README has."""
    block = re.search(r"^```\n(.*?)^```", (REPO / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None
    return block[1].splitlines()


def tree_hash(commit: str = "HEAD", *, repo: Path) -> str:
    """Of a commit's files, the record itself left out."""
    listed = run("git", "-C", repo, "ls-tree", "-r", commit).stdout.splitlines(keepends=True)
    return hashlib.sha256("".join(line for line in listed if not line.endswith("\t.ci/fresh\n")).encode()).hexdigest()


def recorded() -> str:
    """The last result, and how many commits were made since."""
    if not RECORD.exists():
        return "test-fresh: never recorded (make test-fresh)"
    text = RECORD.read_text(encoding="utf-8")
    found = re.search(r"^tree: (\w+)$", text, re.MULTILINE)
    commits = run("git", "-C", REPO, "rev-list", "--first-parent", f"--max-count={MOST_COMMITS}", "HEAD").stdout.split()
    behind = next((number for number, commit in enumerate(commits) if found and tree_hash(commit, repo=REPO) == found[1]), None)
    age = f"{behind} commits behind" if behind is not None else f"of no tree among the last {len(commits)} commits"
    return "".join(f"test-fresh: {line}\n" for line in [*text.splitlines(), age]).rstrip()


def clear(directory: Path) -> None:
    """Removes a machine that nobody runs any more."""
    walks = (os.walk(where) for where in hierarchies())  # which passes over groups that end meanwhile
    remove_groups([Path(where) / directory.name for walk in walks for where, names, _ in walk if directory.name in names])
    remove(directory)


def on_the_machine(directory: Path, plan: dict[str, object]) -> list[list[object]]:
    """Starts the machine's first process, gives it a network, and returns what it tells."""
    out, into = os.pipe()
    tethered, tether = os.pipe()
    groups = make_groups(directory.name)
    slirp = None

    process = subprocess.Popen(
        ["/bin/sh", "-c", _JOIN, "sh", *(str(group / "cgroup.procs") for group in groups), "--",
         "setpriv", "--pdeathsig=KILL", "unshare", "--cgroup", "--mount", "--propagation=private", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child",
         sys.executable, __file__, "--inside", json.dumps(plan | {"out": into})],
        stdin=subprocess.PIPE, pass_fds=[into],
    )  # fmt: skip
    os.close(into)
    try:
        assert process.stdin is not None
        first = next_child(process.pid)
        slirp = connect(first, tethered)
        process.stdin.write(b"\n")
        process.stdin.close()
        with os.fdopen(out) as lines:
            told = [json.loads(line) for line in lines]
        process.wait()
        return told
    finally:
        process.kill()
        process.wait()
        os.close(tether)
        os.close(tethered)
        if slirp is not None:
            slirp.wait(20)


def next_child(pid: int) -> int:
    deadline = time.monotonic() + 20
    while True:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        if time.monotonic() > deadline:
            raise SystemExit("test-fresh: no process was started")
        time.sleep(0.01)


def main() -> int:
    if sys.argv[1:2] == ["--inside"]:
        inside(json.loads(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser()
    parser.add_argument("--release", default=RELEASE)
    parser.add_argument("--odd", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--recorded", action="store_true")
    parser.add_argument("commands", nargs="*")
    given = parser.parse_args()
    if given.recorded:
        print(recorded())
        return 0
    if given.record and (given.commands or given.odd or given.release != RELEASE):
        parser.error(f"only the README's commands on {RELEASE} are recorded")
    if os.geteuid():
        raise SystemExit("test-fresh: this needs root: it makes a root directory and namespaces")
    commands = given.commands or (["make demo", "make check"] if given.odd else readme_commands())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if run("git", "-C", REPO, "status", "--porcelain").stdout.strip():
        print("test-fresh: what is not committed is not in the clone", flush=True)
    with scratch(PREFIX, clear) as directory:
        directory.chmod(0o755)
        root = directory / "root"
        print(f"test-fresh: making a {given.release} in {root}", flush=True)
        make_root(root, given.release)
        variables = lend_sources(root)
        os.umask(0o077 if given.odd else 0o022)
        place = "/root/a place with spaces/torpor" if given.odd else "/root/torpor"
        tree = clone(root / place.lstrip("/"))
        os.umask(0o022)
        told = on_the_machine(directory, {
            "root": str(root), "odd": given.odd, "clone": place, "variables": variables, "commands": commands,
            "indexes": [str(path) for path in indexes(root, variables)],
        })  # fmt: skip
    return report(given, commands, told, tree)


def report(given: argparse.Namespace, commands: list[str], told: list[list[object]], tree: str) -> int:
    lines, passed = [], len(told) == len(commands)
    for command, seconds, status, left, files in told:
        passed = passed and not status and not left
        print(f"\ntest-fresh: {str(command).partition('#')[0].strip()}: {seconds:.0f} s, exit status {status}")
        lines.append(f"{str(command).partition('#')[0].strip()}: {seconds:.0f} s, exit status {status}")
        print(
            "\n".join(f"    left behind: {one}" for one in left) or "    no process, mount, namespace, link, control group or table is left"
        )  # type: ignore[attr-defined]
        for name, count in files.items():  # type: ignore[attr-defined]
            print(f"    made: {name}{f' with {count} files' if count else ''}")
    result = "passed" if passed else "failed"
    print(f"test-fresh: {result}")
    if given.record:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        RECORD.write_text("\n".join([f"time: {now}", f"result: {result}", f"tree: {tree}", *lines]) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
