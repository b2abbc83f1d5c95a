"""Run as a process: what somebody would try who has taken the unpacker over. Prints what succeeded.

ATTACK.py LAYERS CONTROL-FOLDER WORK-FOLDER SOCKET PORT
"""

import contextlib
import json
import os
import socket
import sys
from pathlib import Path

from gateway import confine

layers, control, work, sock, port = sys.argv[1].split(","), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
if "landlock" not in layers:
    confine._by_landlock = lambda reads, writes: []
if "filter" not in layers:
    confine._by_filter = lambda needs: []
parent = os.getppid()
if layers != [""]:
    confine.confine([Path(one) for one in (*sys.path, "/usr", "/lib") if one], [work])
done = []


@contextlib.contextmanager
def trying(what):
    with contextlib.suppress(OSError):
        yield
        done.append(what)


def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.settimeout(2)
        one.connect(address)


with trying("read a key"):
    (control / "keys.json").read_bytes()
with trying("list the folder"):
    os.listdir(control)
with trying("write a key"):
    (control / "keys.json").open("ab").close()
with trying("make a file"):
    (control / f"new {layers}").open("xb").close()
with trying("rename out"):
    (work / "mine").touch()
    os.rename(work / "mine", control / "mine")
with trying("link out"):
    (work / "own").touch()
    os.link(work / "own", control / "link")
with trying("lay a link"):
    os.symlink(control / "keys.json", work / "Dockerfile")
with trying("read the host"):
    Path("/etc/passwd").read_bytes()
with trying("connect to vmm"):
    connect(socket.AF_UNIX, sock)
with trying("connect to the API"):
    connect(socket.AF_INET, ("127.0.0.1", port))
with trying("signal control"):
    os.kill(parent, 0)
with trying("read control's memory"):
    os.close(os.open(f"/proc/{parent}/mem", os.O_RDONLY))
with trying("start a program"):
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
with trying("its own work"):
    (work / "context.tar").write_bytes(b"tar")
    assert (work / "context.tar").read_bytes() == b"tar"
print(json.dumps(done))
