import ctypes
import json
import os
import random
import secrets
import ssl
import struct
import sys
import threading
import time
import uuid

from alarm import Alarms
from renew import renew

ALARMS = Alarms()
FIRED = set()

DRAWS = {
    "random": random.random, "ssl.RAND_bytes": lambda: ssl.RAND_bytes(16).hex(), "os.urandom": lambda: os.urandom(16).hex(),
    "uuid.uuid4": lambda: str(uuid.uuid4()), "secrets": secrets.token_hex, "uuid.uuid1": lambda: str(uuid.uuid1()),
}  # fmt: skip
try:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    DRAWS["cryptography"] = lambda: X25519PrivateKey.generate().public_key().public_bytes_raw().hex()
except ImportError:
    pass


def wait(name, seconds):
    time.sleep(seconds)
    FIRED.add(name)


def wait_timerfd(when):
    """An absolute time of CLOCK_REALTIME."""
    libc = ctypes.CDLL(None)
    timer = libc.timerfd_create(0, 0)
    libc.timerfd_settime(timer, 1, struct.pack("4q", 0, 0, int(when), int(when % 1 * 1e9)), None)
    os.read(timer, 8)
    FIRED.add("timerfd")


def schedule(when):
    threading.Timer(when - time.time(), FIRED.add, ["threading.Timer"]).start()
    threading.Thread(target=wait, args=("time.sleep", when - time.time())).start()
    threading.Thread(target=wait_timerfd, args=(when,)).start()
    ALARMS.at(when, lambda: FIRED.add("alarm"))


COMMANDS = {
    "draw": lambda: {name: draw() for name, draw in DRAWS.items()}, "renew": renew, "woken": ALARMS.woken, "fired": lambda: sorted(FIRED),
    "schedule": lambda when: schedule(float(when)),
}  # fmt: skip
for line in sys.stdin:
    command, *words = line.split()
    print(json.dumps(COMMANDS[command](*words)), flush=True)
