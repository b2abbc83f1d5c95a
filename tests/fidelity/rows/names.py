"""Names: questions of the guest to the resolver at its link."""

from fidelity.table import BASE, SERVER, Image, Run, Subject

_BURST = """\
import socket, time
server = next(line.split()[1] for line in open("/etc/resolv.conf") if line.startswith("nameserver"))
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
sock.settimeout(1)
for number in range(200):
    name = b"".join(bytes([len(part)]) + part for part in (b"n%d" % number, b"burst", b"example")) + bytes(1)
    sock.sendto(number.to_bytes(2, "big") + b"\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0" + name + b"\\0\\1\\0\\1", (server, 53))
answered, deadline = set(), time.monotonic() + 15
while len(answered) < 200 and time.monotonic() < deadline:
    try:
        answered.add(sock.recv(4096)[:2])
    except TimeoutError:
        continue
print(len(answered))
"""

SUBJECT = Subject(
    "Names",
    "A guest's questions go to the host's name servers, where its connector lets it out; each gets an answer, at worst SERVFAIL or REFUSED.",
    [
        Image(
            "names-burst",
            "200 questions at once",
            BASE + "COPY burst.py /burst.py\n" + SERVER,
            [Run("all are answered", "python3 /burst.py", "200")],
            files={"burst.py": _BURST},
            launch={"egressNetworkConnectors": ["arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:INTERNET_EGRESS"]},
        ),
    ],
)
