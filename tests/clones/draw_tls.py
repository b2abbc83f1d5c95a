"""What a long-running program of OpenSSL's, s_server, says in a handshake: its random, of which TLS 1.2 shows all 32 bytes."""

import json
import re
import subprocess
import sys

SERVER = subprocess.Popen(
    ["openssl", "s_server", "-accept", "127.0.0.1:4433", "-cert", "cert.pem", "-key", "key.pem", "-tls1_2", "-www", "-quiet"],
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
)  # fmt: skip


def hello():
    while True:
        said = subprocess.run(
            ["openssl", "s_client", "-connect", "127.0.0.1:4433", "-tls1_2", "-msg"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        found = re.search(r"<<<[^\n]*ServerHello\n((?: {4}[^\n]*\n)+)", said)
        if found:
            return "".join(found[1].split())[12:76]


for line in sys.stdin:
    print(json.dumps({"s_server": hello()} if line == "draw\n" else None), flush=True)
