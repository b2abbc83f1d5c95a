"""Run as a process: what somebody would try who has taken one of the service's own processes over. Prints what succeeded.

SERVICE_ATTACK.py LAYERS KEPT PLACES: KEPT is what the process keeps (gateway/own_walls.py), as JSON.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

from gateway import confine

layers, kept, places = sys.argv[1].split(","), json.loads(sys.argv[2]), json.loads(sys.argv[3])
if "landlock" not in layers:
    confine._by_landlock = lambda reads, writes, serves=False: []
if "filter" not in layers:
    confine._load_filter = lambda code: []
if "dumpable" not in layers:
    prctl = confine._libc.prctl
    confine._libc.prctl = lambda what, *rest: 0 if what == confine._PR_SET_DUMPABLE else prctl(what, *rest)
code = [one for one in (*sys.path, "/usr", "/lib", "/lib64", "/dev/null") if one]
refused = confine.MACHINE | confine.OTHERS | confine.STARTS
confine.confine_service(
    [Path(one) for one in (*code, *kept["reads"])] if kept["reads"] else [], map(Path, kept["writes"]),
    {name: refused[name] for name in kept["refused"]}, kept["families"], kept["starts"],
)  # fmt: skip
print("confined", flush=True)
sys.stdin.readline()
done = []
libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def trying(what):
    with contextlib.suppress(OSError):
        yield
        done.append(what)


def call(number, *arguments):
    """Refused is refused before the kernel looks at what it was told."""
    if libc.syscall(number, *arguments) < 0 and ctypes.get_errno() in (1, 38):
        raise OSError(ctypes.get_errno(), "refused")


def other_worker():
    return places["other"]


with trying("read a file of the host"):
    Path("/etc/passwd").read_bytes()
with trying("read what others of its user wrote"):
    Path(places["secret"]).read_bytes()
with trying("write what is its user's"):
    Path(places["secret"]).open("ab").close()
with trying("run a program"):
    subprocess.run(["/bin/true"], check=True)
with trying("fork"):
    if not (pid := os.fork()):
        os._exit(0)
    os.waitpid(pid, 0)
with trying("open a packet socket"):
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM).close()
    except PermissionError:
        call(41, 17, 2 | 1 << 31, 0)  # of a type that there is not: without the filter the kernel says so first
with trying("open a socket to the kernel's routes"):
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()
with trying("connect to a service of the host"), socket.socket(socket.AF_INET) as one:
    one.settimeout(2)
    one.connect(("127.0.0.1", places["port"]))
with trying("read another worker's memory"):
    os.close(os.open(f"/proc/{other_worker()}/mem", os.O_RDONLY))
with trying("trace another worker"):
    call(101, 0x4206, other_worker(), 0, 0)
    if libc.ptrace(16, other_worker(), 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    libc.ptrace(17, other_worker(), 0, 0)
with trying("signal another worker"):
    os.kill(other_worker(), 0)
with trying("signal another worker by its descriptor"):
    signal.pidfd_send_signal(os.pidfd_open(other_worker()), 0)
with trying("queue another worker a signal"):
    siginfo = ctypes.create_string_buffer(struct.pack("iii", 0, 0, -1), 128)  # as sigqueue(3) has it
    call(129, other_worker(), 0, siginfo)
with trying("have a descriptor signal another worker"):
    fcntl.fcntl(0, fcntl.F_SETOWN, other_worker())
with trying("have a socket signal another worker"), socket.socketpair()[0] as one:
    fcntl.ioctl(one, 0x8901, struct.pack("i", other_worker()))
with trying("take another worker's descriptors"):
    resource.prlimit(other_worker(), resource.RLIMIT_NOFILE, resource.prlimit(other_worker(), resource.RLIMIT_NOFILE))
with trying("move another worker to a processor"):
    os.sched_setaffinity(other_worker(), os.sched_getaffinity(0))
with trying("have another worker run when nobody else does"):
    os.sched_setscheduler(other_worker(), os.SCHED_IDLE, os.sched_param(0))
with trying("slow another worker down"):
    os.setpriority(os.PRIO_PROCESS, other_worker(), 19)
for name, number in (("io_uring", 425), ("bpf", 321), ("userfaultfd", 323), ("keyctl", 250), ("kexec", 246), ("module", 175)):
    with trying(name):
        call(number, 0xDEAD, 0, 0, 0, 0)
# Its own work.
with trying("start a thread"):
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
with trying("signal itself"):
    signal.signal(signal.SIGUSR1, lambda *_: None)
    os.kill(os.getpid(), signal.SIGUSR1)
with trying("bound itself"):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
with trying("read its certificate"):
    Path(places["certificate"]).read_bytes()
with trying("open its log again"):
    os.rename(places["log"], places["log"] + ".1")
    Path(places["log"]).open("ab").close()
with trying("connect to control"), socket.socket(socket.AF_UNIX) as one:
    one.connect(places["control"])
print(json.dumps(done))
