"""The walls that the service's own processes raise around themselves (gateway/own_walls.py).

A stand-in with the edges' user keeps what the process of that name keeps, and tries what somebody would who had taken it over; another
worker runs beside it. Taken away by name: Landlock, the filter, and that it cannot be traced.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway import confine, own_walls
from gateway.config import Edge, Settings, Traces

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an edge has a user of its own")
UID = 640_000
REPO = Path(__file__).parents[2]
ATTACK = Path(__file__).with_name("service_attack.py")
PYTHON = "/usr/bin/python3"  # which every user may start
OWN_WORK = {"start a thread", "signal itself", "bound itself", "read its certificate", "open its log again", "connect to control"}
FILES = {"read a file of the host", "read what others of its user wrote", "write what is its user's"}
STARTS = {"run a program", "fork"}
SOCKETS = {"open a packet socket", "open a socket to the kernel's routes", "connect to a service of the host"}
DISTURBING = {
    "signal another worker", "signal another worker by its descriptor", "queue another worker a signal", "have a descriptor signal another worker",
    "have a socket signal another worker", "take another worker's descriptors", "move another worker to a processor",
    "have another worker run when nobody else does", "slow another worker down",
}  # fmt: skip
OTHERS = {"read another worker's memory", "trace another worker"} | DISTURBING
CALLS = {"io_uring", "bpf", "userfaultfd", "keyctl"}
ALL = "landlock,filter,dumpable"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """An instance's directories, a socket of control's, and a service of the host's that listens on its loopback."""
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == 0 and str(parent) != "/":
            parent.chmod(parent.stat().st_mode | 0o011)
    settings = Settings(root=tmp_path / "root", run=tmp_path / "run", edge=Edge(access_log=str(tmp_path / "log/access.log")))
    for directory in (
        settings.tls_dir,
        settings.control_socket.parent,
        tmp_path / "log",
        tmp_path / "of-others",
        tmp_path / "code/gateway",
    ):
        directory.mkdir(parents=True)
    for file in (settings.tls_dir / "edge.key", tmp_path / "log/access.log", tmp_path / "of-others/secret"):
        file.write_text("secret")
        file.chmod(0o600)
        os.chown(file, UID, UID)
    os.chown(tmp_path / "log", UID, UID)
    os.chown(tmp_path / "of-others", UID, UID)
    shutil.copy(ATTACK, tmp_path / "code")
    shutil.copy(confine.__file__, tmp_path / "code/gateway")
    with socket.socket(socket.AF_UNIX) as control, socket.socket() as service:
        control.bind(str(settings.control_socket))
        settings.control_socket.chmod(0o666)
        control.listen()
        service.bind(("127.0.0.1", 0))
        service.listen()
        places = {
            "secret": str(tmp_path / "of-others/secret"), "certificate": str(settings.tls_dir / "edge.key"),
            "log": str(tmp_path / "log/access.log"), "control": str(settings.control_socket), "port": service.getsockname()[1],
        }  # fmt: skip
        yield SimpleNamespace(settings=settings, places=places, code=tmp_path / "code")


def started(host: SimpleNamespace, name: str, layers: str, settings: Settings, **places: Any) -> subprocess.Popen[str]:
    kept = own_walls.kept(name, settings)
    said = kept._asdict() | {"reads": [str(settings.tls_dir)], "writes": list(map(str, kept.writes)), "refused": list(kept.refused)}
    words = [str(host.code / ATTACK.name), layers, json.dumps(said), json.dumps(host.places | places)]
    command = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--no-new-privs", "--", PYTHON, *words]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(host.code), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd="/"
    )  # fmt: skip
    assert process.stdout is not None
    said_first = process.stdout.readline()
    assert said_first == "confined\n", process.communicate()
    return process


def attacked(host: SimpleNamespace, layers: str = ALL, name: str = "edge-0", settings: Settings | None = None) -> set[str]:
    settings = settings or host.settings
    with started(host, name, layers, settings, other=0) as other:
        with started(host, name, layers, settings, other=other.pid) as process:
            out, errors = process.communicate("\n", timeout=60)
        other.kill()
    assert process.returncode == 0, errors
    return set(json.loads(out))


def test_an_edge_that_was_taken_over_has_its_own_work_and_nothing_else(host: SimpleNamespace) -> None:
    assert attacked(host) == OWN_WORK


def test_without_the_walls_it_has_all_that_its_user_has(host: SimpleNamespace) -> None:
    found = attacked(host, "")
    assert found >= OWN_WORK | FILES | STARTS | SOCKETS | DISTURBING | {"read another worker's memory"}
    assert found & CALLS, "of calls that a kernel is built with"


def test_each_layer_by_itself_keeps_its_own(host: SimpleNamespace) -> None:
    by_filter = attacked(host, "filter")
    assert by_filter >= FILES and not by_filter & (STARTS | SOCKETS | CALLS | DISTURBING | {"trace another worker"})
    os.rename(f"{host.places['log']}.1", host.places["log"])
    by_landlock = attacked(host, "landlock")
    assert by_landlock >= STARTS | {"connect to a service of the host"} and not by_landlock & FILES
    os.rename(f"{host.places['log']}.1", host.places["log"])
    assert "read another worker's memory" not in attacked(host, "dumpable")


def test_an_edge_that_sends_traces_may_connect_and_still_start_nothing(host: SimpleNamespace) -> None:
    settings = host.settings.model_copy(update={"traces": Traces(endpoint="http://127.0.0.1:4318")})
    found = attacked(host, settings=settings)
    assert "connect to a service of the host" in found and not found & (STARTS | OTHERS | CALLS)


def test_control_starts_the_unpacker_and_still_reaches_into_nobody(host: SimpleNamespace) -> None:
    found = attacked(host, name="control")
    assert found >= {"run a program", "fork", "connect to a service of the host"}
    assert not found & ({"read another worker's memory", "trace another worker", "open a packet socket"} | CALLS | {"kexec", "module"})


def test_vmm_which_is_root_changes_no_kernel(host: SimpleNamespace) -> None:
    left = own_walls.kept("vmm", host.settings)
    assert not left.reads and left.starts and left.families is None, "it mounts, starts and connects"
    assert {"kexec_load", "kexec_file_load", "init_module", "finit_module", "iopl", "ioperm", "reboot", "swapon"} <= set(left.refused)
    words = "import sys; from pathlib import Path; from gateway import confine; import ctypes, os\n" + (
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def tried():\n"
        "    return [libc.syscall(number, 0xDEAD, 0xDEAD, 0xDEAD, 0, 0) and ctypes.get_errno() for number in (169, 172, 168)]\n"
        "before = tried()\n"
        "print(confine.confine_service([], [], confine.MACHINE, None, True), before, tried())\n"
        "os.system('true')\n"
    )
    done = subprocess.run(
        [PYTHON, "-c", words],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"PYTHONPATH": str(host.code)},
        cwd="/",
    )
    assert done.stdout.startswith("['filter'] [") and done.stdout.rstrip().endswith("[1, 1, 1]")
    assert "[1, 1, 1] [1, 1, 1]" not in done.stdout, "without the wall the kernel looks at them"


@pytest.mark.skipif(not confine.landlock_version(), reason="no Landlock")
@pytest.mark.parametrize("is_socket", [False, True])
def test_a_log_on_standard_output_keeps_no_edge_from_its_walls(tmp_path: Path, is_socket: bool) -> None:
    """A pipe or a socket: the kernel takes no rule of Landlock's about either, and asks for none. Nobody opens a socket by its name."""
    (tmp_path / "other").write_text("")
    words = (
        "import sys\nfrom pathlib import Path\nfrom gateway import own_walls\nfrom gateway.config import Edge, Settings\n"
        "own_walls.raise_walls('edge-0', Settings(root=Path(sys.argv[1]), edge=Edge(access_log='/dev/stdout')))\n"
        "try:\n    open(Path(sys.argv[1]) / 'other', 'ab')\nexcept PermissionError:\n    print('refused', flush=True)\n"
        "with open(1 if sys.argv[2:] else '/dev/stdout', 'ab', buffering=0) as log:\n    log.write(b'a line\\n')\n"
    )
    command = [sys.executable, "-c", words, str(tmp_path), *(["socket"] if is_socket else [])]
    ours, theirs = (end.detach() for end in socket.socketpair()) if is_socket else os.pipe()
    try:
        done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=60, check=False, cwd=REPO)
        assert done.returncode == 0, done.stderr
        assert os.read(ours, 4096) == b"refused\na line\n"
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("is_bound", [True, False])
def test_none_takes_all_of_the_hosts_memory(is_bound: bool) -> None:
    """What is beyond its share is not there, and what asked for it goes on to something else."""
    words = (
        "from gateway import own_walls\nfrom gateway.config import Service, Settings\n"
        + ("own_walls.bound_memory(Settings(service=Service(memory_mib=512)))\n" if is_bound else "")
        + "try:\n    len(bytearray(1 << 30))\n    print('taken')\nexcept MemoryError:\n    print('refused', len(bytearray(1 << 20)))\n"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60, check=True, cwd=REPO)
    assert done.stdout == ("refused 1048576\n" if is_bound else "taken\n")


def test_the_filters_of_processes_that_serve_are_programs_on_each_machine() -> None:
    for machine in ("x86_64", "aarch64"):
        code = confine.service_program(machine, confine.MACHINE | confine.OTHERS | confine.STARTS, (1, 2, 10), False, 7)
        lines = [code[at : at + 8] for at in range(0, len(code), 8)]
        assert len(code) % 8 == 0 and len(lines) < 4096, "what a kernel takes (BPF_MAXINSNS)"
        for at, line in enumerate(lines):
            if line[0] & 0x07 == 0x05:  # a jump
                assert at + 1 + max(line[2], line[3]) < len(lines)


def test_the_numbers_of_calls_are_the_kernels() -> None:
    """A number that is another call's refuses that one: a step of a build could not name its host."""
    headers = [Path("/usr/include") / name for name in ("x86_64-linux-gnu/asm/unistd_64.h", "asm-generic/unistd.h")]
    lists = (confine.REFUSED, confine.MACHINE, confine.OTHERS, confine.STARTS, confine._CALLS, confine._DISTURBING, confine._HOT)
    for column, header in enumerate(headers):
        if not header.exists():
            pytest.skip(f"{header} is not here")
        known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())}
        assert len(known) > 300
        wrong = {name: pair[column] for calls in lists for name, pair in calls.items() if known.get(name) != pair[column]}
        assert not wrong
