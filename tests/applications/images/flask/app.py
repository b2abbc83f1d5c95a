import os
import threading
import time

from flask import Flask, jsonify, request, session

app = Flask(__name__)
app.secret_key = os.urandom(16)
work = {"done": 0, "of": 0}
lock = threading.Lock()


@app.post("/login")
def login():
    session["user"] = request.form["user"]
    return "welcome"


@app.get("/me")
def me():
    return jsonify(user=session.get("user"), pid=os.getpid())


def scan(steps):
    for _ in range(steps):
        sum(number * number for number in range(20_000))
        time.sleep(0.05)
        with lock:
            work["done"] += 1


@app.post("/scan")
def begin():
    """Work that goes on when its request has been answered."""
    work.update(done=0, of=int(request.form["steps"]))
    threading.Thread(target=scan, args=(work["of"],)).start()
    return jsonify(work)


@app.get("/scan")
def look():
    with lock:
        return jsonify(work)
