"""Which connections a guest's init ends after a sleep (vmm/guest/connections.c), in namespaces like a guest's that runs containers.

It looks at every process that it sees: the test has a PID namespace of its own.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.vm
GUEST = Path(__file__).parents[2] / "vmm/guest"
MAIN = """
#include "app.h"
#include "connections.h"
#include "util.h"
#include <stdlib.h>
int app_is_whole = 1;
void must(int result, const char *what) { (void)what; if (result < 0) abort(); }
int main(void) { connections_prepare(); connections_reset(); return 0; }
"""
# The guest, its host ($O, with a server beyond it) and a container ($C) behind a bridge.
SCRIPT = """
set -e
ip link set lo up
unshare -n sleep 60 & O=$!
unshare -n sleep 60 & C=$!
for process in $O $C; do while [ /proc/$process/ns/net -ef /proc/$$/ns/net ]; do sleep 0.01; done; done
at() { nsenter -t $1 -n sh -c "$2"; }
ip link add eth0 type veth peer name out netns $O
at $O 'ip link set lo up; ip addr add 169.254.77.1/30 dev out; ip addr add 198.51.100.7/32 dev lo; ip link set out up'
at $O 'ip route add 10.1.1.0/24 via 169.254.77.2'
ip addr add 169.254.77.2/30 dev eth0; ip link set eth0 up; ip route add default via 169.254.77.1
ip link add br0 type bridge; ip link add v0 master br0 type veth peer name v1 netns $C
ip addr add 10.1.1.1/24 dev br0; ip link set br0 up; ip link set v0 up
at $C 'ip link set lo up; ip addr add 10.1.1.2/24 dev v1; ip link set v1 up; ip route add default via 10.1.1.1'
echo 1 > /proc/sys/net/ipv4/ip_forward
listen='import socket
listener, kept = socket.create_server(("0.0.0.0", 77)), []
while True: kept.append(listener.accept())'
for place in $$ $O $C; do nsenter -t $place -n "$PYTHON" -c "$listen" & done
connect='import socket, sys, time
for _ in range(500):
    try: connection = socket.create_connection((sys.argv[2], 77)); break
    except OSError: time.sleep(0.01)
print(sys.argv[1], "open", flush=True)
try: connection.recv(1)
except OSError: print(sys.argv[1], "over", flush=True)'
hold() { nsenter -t $1 -n "$PYTHON" -c "$connect" $2 $3 >> $HELD & }
hold $$ guest-out 198.51.100.7; hold $$ guest-loopback 127.0.0.1; hold $$ guest-container 10.1.1.2
hold $C container-out 198.51.100.7; hold $C container-guest 10.1.1.1; hold $O host-container 10.1.1.2
while [ "$(grep -c open $HELD)" != 6 ]; do sleep 0.01; done
$RESET
while [ "$(grep -c over $HELD)" -lt 2 ]; do sleep 0.01; done
nsenter -t $C -n ss -Htn state established | wc -l
"""


def test_connections_to_the_outside_end_and_those_within_go_on(tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text(MAIN)
    headers = subprocess.run(["gcc", "-print-multiarch"], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(
        ["musl-gcc", "-std=gnu11", "-static", f"-I{GUEST}", "-idirafter", "/usr/include", "-idirafter", f"/usr/include/{headers}",
         "-o", tmp_path / "reset", tmp_path / "main.c", GUEST / "connections.c"],
        check=True, timeout=60,
    )  # fmt: skip
    held = tmp_path / "held"
    held.touch()
    ran = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", SCRIPT],
        check=False, timeout=30, capture_output=True, text=True,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHON": "/usr/bin/python3", "HELD": str(held), "RESET": str(tmp_path / "reset")},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    over = {line.split()[0] for line in held.read_text().splitlines() if line.endswith("over")}
    assert over == {"guest-out", "container-out"}
    assert ran.stdout.strip() == "3", "the container still talks to the guest, the guest to it, and the host to what it publishes"
