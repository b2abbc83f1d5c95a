"""Run as a process: what somebody would try who has taken the relay over. Prints what succeeded.

RELAY_ATTACK.py IS-CONFINED FILE PORT
"""

import contextlib
import json
import os
import socket
import sys
from pathlib import Path

from gateway import confine
from gateway.guest import relay

is_confined, file, port = sys.argv[1] == "1", Path(sys.argv[2]), int(sys.argv[3])
unconnected = socket.socket(socket.AF_INET, socket.SOCK_STREAM)  # as control might leave one
listener = socket.create_server(("127.0.0.1", 0))
with socket.create_connection(listener.getsockname()) as client:
    parent = os.getppid()
    if is_confined:
        assert set(confine.confine([Path(one) for one in (*sys.path, "/usr", "/lib") if one], [], relay._NEEDS)) <= {"landlock", "filter"}
    done = []

    @contextlib.contextmanager
    def trying(what):
        with contextlib.suppress(OSError):
            yield
            done.append(what)

    with trying("read a file of control's"):
        file.read_bytes()
    with trying("write one"):
        file.open("ab").close()
    with trying("connect"):
        unconnected.connect(("127.0.0.1", port))
    with trying("make a socket"):
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
    with trying("make a pair"):
        socket.socketpair()
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
        sock, _ = listener.accept()
        client.sendall(b"x")
        assert sock.recv(10) == b"x"
        sock.close()
print(json.dumps(done))
