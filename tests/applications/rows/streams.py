"""WebSockets, socket.io, gRPC, and TCP by WebSocket."""

from __future__ import annotations

import asyncio
import functools
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from service import until
from websockets.asyncio.client import connect

from applications.table import Application
from applications.visit import Visit


def socketio(visit: Visit) -> None:
    with visit.http() as web, visit.node("socketio.mjs") as client:
        one = client.hear("connect")["connect"]
        client.say("41")
        assert client.hear("total") == {"total": 41, "id": one}
        visit.sleep()
        client.say("1")
        assert client.hear("total") == {"total": 42, "id": one}, "the same session"
        # Silent for longer than its pings may be away: it gives up, connects again, and so wakes the microVM.
        visit.sleep()
        assert client.hear("disconnect")["disconnect"] == "ping timeout"
        client.hear("connect")
        client.say("100")
        assert client.hear("total")["total"] == 142
        until(lambda: web.get("/").json()["connected"] == 1)


def game(visit: Visit) -> None:
    players, ticks = 20, 60

    async def play() -> None:
        fields = {"additional_headers": visit.fields, "ssl": visit.trust, "open_timeout": 60}
        sockets = [await connect(f"wss://{visit.host}/play", **fields) for _ in range(players)]

        async def hear(socket: Any, kind: str) -> dict[str, Any]:
            async with asyncio.timeout(90):
                while True:
                    said = json.loads(await socket.recv())
                    if kind in said:
                        return dict(said)

        for socket in sockets:
            await hear(socket, "players")
        await asyncio.to_thread(visit.sleep)
        await sockets[7].send("here")
        assert [await hear(socket, "order") for socket in sockets] == [{"order": 1, "said": "here"}] * players
        await asyncio.to_thread(visit.sleep)
        await asyncio.gather(*(socket.send(f"player {number}") for number, socket in enumerate(sockets)))
        heard = [[await hear(socket, "order") for _ in range(players)] for socket in sockets]
        assert all(one == heard[0] for one in heard), "all hear the same, in one order"
        assert sorted(one["said"] for one in heard[0]) == sorted(f"player {number}" for number in range(players))
        # A sleep in the middle of the server's ticks: none is lost, none comes twice.
        await sockets[0].send(f"ticks {ticks}")
        for socket in sockets:
            assert (await hear(socket, "tick"))["tick"] == 0
        await asyncio.to_thread(visit.sleep)
        await sockets[3].send("wake up")
        for socket in sockets:
            assert [(await hear(socket, "tick"))["tick"] for _ in range(ticks - 1)] == list(range(1, ticks))
        for socket in sockets:
            await socket.close()

    asyncio.run(play())


def grpc(visit: Visit) -> None:
    import grpc

    host, _, port = visit.host.partition(":")
    credentials = grpc.ssl_channel_credentials(Path(visit.ca).read_bytes())
    options = [("grpc.ssl_target_name_override", host), ("grpc.default_authority", visit.host), ("grpc.keepalive_time_ms", 5000)]
    fields = [(name.lower(), value) for name, value in visit.fields.items()]
    forced = [*fields, ("x-aws-proxy-force-h2", "true")]
    turns = threading.Semaphore(0)

    def says() -> Iterator[bytes]:
        for word in (b"one", b"two", b"three"):
            assert turns.acquire(timeout=120)
            yield word

    with grpc.secure_channel(f"127.0.0.1:{port or 443}", credentials, options) as channel:
        total = channel.unary_unary("/chat.Chat/Total")
        assert total(b"", metadata=forced, timeout=60) == b"0"
        chat = channel.stream_stream("/chat.Chat/Chat")(says(), metadata=forced, timeout=300)
        turns.release()
        assert next(chat) == b"1 1 one"
        visit.sleep()
        turns.release()
        assert next(chat) == b"2 2 two", "the same call, in the same server"
        visit.sleep()
        assert total(b"", metadata=forced, timeout=60) == b"2", "a unary call wakes it"
        watch = channel.unary_stream("/chat.Chat/Watch")(b"", metadata=forced, timeout=120)
        assert next(watch) == b"0"
        visit.sleep()
        try:
            for _ in watch:
                pass
            raise AssertionError("a stream of the server's alone is cut")
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.CANCELLED, error  # how gRPC names an RST_STREAM of CANCEL
        turns.release()
        assert next(chat) == b"3 3 three"
        assert list(chat) == []
        try:
            total(b"", metadata=fields, timeout=60)
            raise AssertionError("it speaks HTTP/2 only")
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error


def redis(visit: Visit) -> None:
    import redis as client

    with visit.tunnel() as port:
        one, two = (client.Redis(port=port, socket_timeout=90, protocol=2) for _ in range(2))
        with one, two, two.pubsub() as channel:
            channel.subscribe("news")
            assert until(lambda: channel.get_message(timeout=5))["type"] == "subscribe"
            connection = one.client_id()
            assert one.incr("n") == 1 and one.set("passing", "x", ex=600)
            visit.sleep()
            asleep = time.monotonic()
            time.sleep(10)  # the length of the sleep is what is looked at
            slept = time.monotonic() - asleep
            assert one.incr("n") == 2 and one.client_id() == connection, "the connection it had"
            left = int(one.pttl("passing"))
            assert 0 < left < 600_000 - (slept - 1) * 1000, left
            visit.sleep()
            assert one.publish("news", "hello") == 1
            assert until(lambda: channel.get_message(timeout=5))["data"] == b"hello"
            assert one.config_get("appendonly")["appendonly"] == "yes" and one.info("persistence")["aof_last_write_status"] == "ok"


def postgresql(visit: Visit) -> None:
    import psycopg2

    with visit.tunnel() as port:
        one, two = (psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres") for _ in range(2))
        two.autocommit = True
        with one.cursor() as writer, two.cursor() as reader:
            reader.execute("create table kept (n integer)")
            writer.execute("create temporary table passing (n integer); insert into kept select generate_series(1, 1000)")
            writer.execute("select pg_backend_pid()")
            process = writer.fetchone()
            visit.sleep()
            reader.execute("select count(*) from kept")
            assert reader.fetchone() == (0,), "the transaction is still open"
            visit.sleep()
            one.commit()
            reader.execute("select sum(n) from kept")
            assert reader.fetchone() == (500_500,)
            writer.execute("select count(*), pg_backend_pid() from passing")
            assert writer.fetchone() == (0, *process)
        one.close()
        two.close()


@functools.cache
def _pair() -> tuple[bytes, bytes]:
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), public + b"\n"


def sshd(visit: Visit) -> None:
    key, known = visit.directory / "key", visit.directory / "known"
    key.write_bytes(_pair()[0])
    key.chmod(0o600)
    with visit.tunnel() as port:
        options = ["-i", str(key), "-o", f"UserKnownHostsFile={known}", "-o", "StrictHostKeyChecking=no", "-o", "ServerAliveInterval=0"]
        shell = subprocess.Popen(
            ["ssh", *options, "-p", str(port), "dev@127.0.0.1", "bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        assert shell.stdin is not None and shell.stdout is not None
        shell.stdin.write("x=41; echo $$\n")
        shell.stdin.flush()
        process = shell.stdout.readline()
        assert process.strip().isdigit()
        visit.sleep()
        shell.stdin.write("echo $((x + 1)) $$\n")
        shell.stdin.flush()
        assert shell.stdout.readline() == f"42 {process}"
        file, back = visit.directory / "file", visit.directory / "back"
        file.write_bytes(bytes(range(256)) * 20_000)
        visit.sleep()
        visit.run("scp", "-P", str(port), *options, str(file), "dev@127.0.0.1:copy")
        visit.run("scp", "-P", str(port), *options, "dev@127.0.0.1:copy", str(back))
        assert back.read_bytes() == file.read_bytes()
        shell.stdin.write("exit 7\n")
        shell.stdin.close()
        assert shell.wait(60) == 7
        shell.stdout.close()


ROWS = [
    Application("socketio", "Express with socket.io", "npm's `socket.io-client`", socketio, 3000, "the session and its id, where the client speaks within its ping timeout", "a client that is silent for longer gives up by its own clock (`pingInterval` + `pingTimeout`, 45 s by default), connects again, and so wakes it"),
    Application("game", "a game of 20 players on WebSockets (aiohttp)", "`websockets`", game, 8080, "all connections, the order of messages, ticks in the middle of which it fell asleep"),
    Application("grpc", "gRPC: unary, bidirectional, server streaming", "grpcio, `x-aws-proxy-force-h2`, with keep-alive pings", grpc, 50051, "a bidirectional call, in the middle", "server streaming ends with CANCELLED (an RST_STREAM); without force-h2 every call ends with UNAVAILABLE"),
    Application("redis", "Redis with an append-only file", "redis-py, by a WebSocket", redis, 6380, "connections, subscriptions; keys expire by the wall clock, also in the sleep"),
    Application("postgresql", "PostgreSQL with its default socket below /run", "psycopg2, by a WebSocket", postgresql, 5433, "connections, open transactions, temporary tables"),
    Application("sshd", "sshd", "OpenSSH's ssh and scp, by a WebSocket", sshd, 2222, "a shell and its connection", files=lambda: {"authorized_keys": _pair()[1]}),
]  # fmt: skip
