"""The application in the tests' microVMs: small, asyncio, no packages. It counts, so that tests can see what was lost."""

import asyncio
import base64
import hashlib
import json
import os
import random
import signal
import socket
import struct
import time
import urllib.error
import urllib.request
from urllib.parse import parse_qs, urlsplit

STATE = {"counter": 0, "ticks": 0, "hooks": [], "mono": time.monotonic()}
FILE = "/tmp/lines"
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
HOOK_STATUS = {}
outbound = None


async def tick():
    while True:
        await asyncio.sleep(0.1)
        STATE["ticks"] += 1


def facts(peer):
    with open("/proc/self/status") as file:
        status = dict(line.rstrip().split(":\t", 1) for line in file if ":\t" in line)
    return {
        "counter": STATE["counter"], "ticks": STATE["ticks"], "pid": os.getpid(), "uid": os.getuid(), "time": time.time(),
        "mono": time.monotonic(), "random": os.urandom(8).hex(), "peer": peer[0], "env": dict(os.environ),
        "lines": sum(1 for _ in open(FILE)) if os.path.exists(FILE) else 0, "cap_eff": status["CapEff"], "cpus": os.cpu_count(),
        "host": socket.gethostname(), "python_random": random.random(), "hooks": STATE["hooks"],
    }  # fmt: skip


def connect(query):
    """What somebody outside says, over TCP or UDP."""
    kind = socket.SOCK_DGRAM if query.get("udp") else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.settimeout(float(query.get("s", 3)))
        try:
            sock.connect((query["host"], int(query["port"])))
            sock.sendall(bytes.fromhex(query["hex"]) if "hex" in query else b"hello")
            return {"heard": sock.recv(100).decode("latin-1")}
        except OSError as error:
            return {"error": str(error)}


def fetch(ask):
    """One HTTP request to somewhere else."""
    request = urllib.request.Request(ask["url"], method=ask.get("method", "GET"), headers=ask.get("headers", {}))
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return {"status": reply.status, "body": reply.read().decode()}
    except urllib.error.HTTPError as error:
        return {"status": error.code, "body": error.read().decode()}
    except OSError as error:
        return {"error": str(error)}


async def read_head(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    line, *lines = head.decode("latin-1").split("\r\n")[:-2]
    return line, {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in lines)}


async def read_body(reader, fields):
    if fields.get("transfer-encoding", "").lower() == "chunked":
        body = b""
        while size := int((await reader.readline()).split(b";")[0], 16):
            body += await reader.readexactly(size)
            await reader.readline()
        while (await reader.readline()).strip():
            pass
        return body
    return await reader.readexactly(int(fields.get("content-length", 0)))


def answer(status, body, extra=""):
    kind = "application/json" if isinstance(body, dict) else "text/plain"
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    return f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n{extra}\r\n".encode() + data


async def websocket(reader, writer, fields):
    accept = base64.b64encode(hashlib.sha1(fields["sec-websocket-key"].encode() + GUID).digest()).decode()
    offered = [one.strip() for one in fields.get("sec-websocket-protocol", "").split(",") if one.strip()]
    chosen = f"Sec-WebSocket-Protocol: {offered[0]}\r\n" if offered else ""
    writer.write(f"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n{chosen}\r\n".encode())
    while True:
        first, second = await reader.readexactly(2)
        length = second & 127
        if length == 126:
            (length,) = struct.unpack(">H", await reader.readexactly(2))
        mask = await reader.readexactly(4)
        data = bytes(b ^ mask[i % 4] for i, b in enumerate(await reader.readexactly(length)))
        if first & 15 == 8:
            writer.write(bytes([0x88, len(data)]) + data)
            return
        if first & 15 in (9, 10):  # as RFC 6455 wants it: a pong for a ping
            writer.write(bytes([0x8A, len(data)]) + data if first & 15 == 9 else b"")
            continue
        STATE["counter"] += 1
        writer.write(bytes([0x80 | first & 15]) + (bytes([length]) if length < 126 else struct.pack(">BH", 126, length)) + data)


async def serve(reader, writer):
    peer = writer.get_extra_info("peername")
    try:
        while True:
            line, fields = await read_head(reader)
            method, target, _ = line.split(" ")
            url = urlsplit(target)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            if fields.get("upgrade", "").lower() == "websocket":
                await websocket(reader, writer, fields)
                return
            if fields.get("expect", "").lower() == "100-continue":
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if url.path == "/early":
                writer.write(answer(413, b"too much", "Connection: close\r\n"))
                return
            body = await read_body(reader, fields)
            await respond(method, url.path, query, fields, body, writer, peer)
            await writer.drain()
            if fields.get("connection", "").lower() == "close":
                return
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def listen(query):
    server = await asyncio.start_server(serve, query.get("host", "0.0.0.0"), int(query["port"]))
    STATE.setdefault("late", {})[query["port"]] = server


async def respond(method, path, query, fields, body, writer, peer):
    if path == "/":
        STATE["counter"] += 1
        with open(FILE, "a") as file:
            file.write("line\n")
        print("visit", STATE["counter"], flush=True)
        writer.write(answer(200, facts(peer)))
    elif path == "/tls":
        import ssl  # only here: it makes every launch longer

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain("tls.pem")
        STATE.setdefault("servers", []).append(await asyncio.start_server(serve, "0.0.0.0", 8443, ssl=context))
        writer.write(answer(200, b"listening"))
    elif path == "/listen":
        asyncio.get_running_loop().call_later(float(query.get("after", 0)), lambda: asyncio.create_task(listen(query)))
        writer.write(answer(200, b"later"))
    elif path == "/unlisten":
        STATE["late"].pop(query["port"]).close()
        writer.write(answer(200, b"closed"))
    elif path == "/state":
        writer.write(answer(200, facts(peer)))
    elif path == "/processor":
        with open("/proc/cpuinfo") as file:
            writer.write(answer(200, next(line for line in file if line.startswith("flags")).encode()))
    elif path == "/fields":
        writer.write(answer(200, {"fields": fields, "method": method, "body": len(body)}))
    elif path == "/echo":
        STATE["counter"] += 1
        writer.write(answer(200, body))
    elif path == "/page" and method == "PUT":
        STATE["page"] = body
        writer.write(answer(200, b"kept"))
    elif path == "/page":
        writer.write(answer(200, STATE["page"]).replace(b"text/plain", b"text/html", 1))
    elif path == "/slow":
        await asyncio.sleep(float(query["s"]))
        STATE["counter"] += 1
        writer.write(answer(200, b"slow"))
    elif path == "/stream":
        writer.write(b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nTrailer: X-End\r\n\r\n")
        for number in range(int(query["n"])):
            data = f"data: {number}\n\n".encode()
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
            await writer.drain()
            await asyncio.sleep(float(query.get("s", 0)))
        writer.write(b"0\r\nX-End: yes\r\n\r\n")
    elif path == "/big":
        size = int(query["n"])
        writer.write(f"HTTP/1.1 200 X\r\nContent-Length: {size}\r\n\r\n".encode())
        for at in range(0, size, 65536):
            writer.write(b"x" * min(65536, size - at))
            await writer.drain()
    elif path == "/empty":
        writer.write(b"HTTP/1.1 204 X\r\n\r\n")
    elif path == "/exit":
        writer.write(answer(200, b"bye"))
        await writer.drain()
        os.kill(os.getpid(), signal.SIGKILL) if query.get("kill") else os._exit(int(query.get("code", 0)))
    elif path == "/sync":
        await asyncio.to_thread(os.sync)
        writer.write(answer(200, b"synced"))
    elif path == "/dirty":
        STATE["dirty"] = os.urandom(1 << 20) * int(query["mib"])
        writer.write(answer(200, b"dirty"))
    elif path == "/connect":
        writer.write(answer(200, await asyncio.to_thread(connect, query)))
    elif path == "/resolve":
        try:
            found = await asyncio.to_thread(socket.gethostbyname, query["name"])
        except OSError as error:
            found = str(error)
        writer.write(answer(200, {"address": found}))
    elif path == "/fetch":
        writer.write(answer(200, await asyncio.to_thread(fetch, json.loads(body))))
    elif path == "/hook-status":
        HOOK_STATUS.update({name: int(value) for name, value in query.items()})
        writer.write(answer(200, b"ok"))
    elif path.startswith("/aws/lambda-microvms/runtime/v1/"):
        name = path.rpartition("/")[2]
        STATE["hooks"].append([name, body.decode(), fields.get("host", ""), peer[0]])
        status = HOOK_STATUS.get(name, int(os.environ.get(f"HOOK_{name.upper()}", "200")))
        writer.write(answer(status, b"hook", "Connection: close\r\n"))
    else:
        writer.write(answer(404, b"no such path"))


async def main():
    asyncio.create_task(tick())
    with open("/var/tmp/started", "wb") as file:  # before it listens, which says that it has started: no clone should have to write it
        file.write(os.urandom(1 << 20) * 4)
    await asyncio.start_server(serve, "0.0.0.0", int(os.environ.get("APP_PORT", "8080")))
    await asyncio.start_server(serve, "127.0.0.1", 7001)
    await asyncio.start_server(serve, "0.0.0.0", 9000)
    print("serving", os.environ["GREETING"], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
