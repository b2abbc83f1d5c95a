"""Runs a process for each runtime that there is, has each draw once, and is ready then; GET /draw asks them again.

The run hook has them renew themselves as docs/clones.md says, where its payload is "renew". GET /schedule/WHEN sets timers in those of
TIMED, which the resume hook tells; GET /fired says which have fired.
"""

import json
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

COMMANDS = {
    "python": ["python3", "draw.py"], "node": ["node", "draw.js"], "node with its own OpenSSL": ["node-own", "draw.js"],
    "perl": ["perl", "draw.pl"], "ruby": ["ruby", "draw.rb"], "php": ["php", "draw.php"], "go": ["./draw-go"],
    "java": ["java", "-Xmx64m", "-XX:TieredStopAtLevel=1", "Draw"], "openssl s_server": ["python3", "draw_tls.py"],
}  # fmt: skip
TIMED = ("python", "node")  # docs/sleep.md
RUNTIMES = {}
STARTED = threading.Event()


class Runtime:
    def __init__(self, command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ask("draw")

    def ask(self, what):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def start():
    for name, command in COMMANDS.items():
        if shutil.which(command[0]):
            RUNTIMES[name] = Runtime(command)
    STARTED.set()


def ask(what):
    asked = TIMED if what.split()[0] in ("schedule", "woken", "fired") else RUNTIMES
    return {name: RUNTIMES[name].ask(what) for name in asked}


class Handler(BaseHTTPRequestHandler):
    def answer(self, status, what=None):
        body = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(200, ask(self.path[1:].replace("/", " ")))

    def do_POST(self):
        said = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        if self.path.endswith("/ready"):
            self.answer(200 if STARTED.is_set() else 503)
        elif self.path.endswith("/resume"):
            self.answer(200, ask("woken"))
        elif said.get("runHookPayload") == "renew":
            self.answer(200, ask("renew"))
        else:
            self.answer(200)

    def log_message(self, *arguments):
        pass


threading.Thread(target=start, daemon=True).start()
HTTPServer(("", 9000), Handler).serve_forever()
