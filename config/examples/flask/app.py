"""The example application: state in memory, state on disk, and a thread that never stops ticking."""

import os
import threading
import time
from pathlib import Path

from flask import Flask, jsonify, request

app = Flask(__name__)
lock = threading.Lock()
state = {"counter": 0, "ticks": 0}
FILE = Path("/tmp/visits.txt")


def tick() -> None:
    while True:
        time.sleep(0.1)
        state["ticks"] += 1


threading.Thread(target=tick, daemon=True).start()


@app.get("/")
def index():
    """Counts the visit in memory and on disk, and says what this process remembers."""
    with lock:
        state["counter"] += 1
        with FILE.open("a") as file:
            file.write(f"{state['counter']}\n")
    lines = FILE.read_text().count("\n")
    return jsonify(counter=state["counter"], file_lines=lines, ticks=state["ticks"], pid=os.getpid(), time=time.time())


@app.get("/random")
def random_bytes():
    return jsonify(random=os.urandom(16).hex())


@app.post("/echo")
def echo():
    return request.get_data(), 200, {"Content-Type": request.content_type or "application/octet-stream"}
