"""The wall around the API's wire: nobody holds it up by saying nothing, and beyond loopback nothing goes in the clear.

Taken away by name: the bounds of `Connections` (gateway/api/connections.py), `check_head` (gateway/api/sigv4.py), `api.tls`.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from aiohttp import web
from api_rig import KEY, REGION, SECRET, ApiRig
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError, SSLError

from gateway import config, instance, listeners
from gateway.api import connections, sigv4
from gateway.api.connections import Certificate, Connections, Listener, Scrapers
from gateway.config import ConfigError, Settings
from gateway.observe import health, metrics

VMS = "/2025-09-09/microvms"
PATIENCE = 20.0


@contextlib.contextmanager
def rig(directory: Path, tls: ssl.SSLContext | None = None, **api: Any) -> Iterator[ApiRig]:
    directory.mkdir(exist_ok=True)
    one = ApiRig(directory / "api", tls=tls, api=api)
    try:
        yield one
    finally:
        one.close()


def signed_head(port: int, key: str, length: int, more: dict[str, str] | None = None, body: bytes = b"") -> bytes:
    request = AWSRequest("POST", f"http://127.0.0.1:{port}{VMS}", data=body, headers={"Content-Type": "application/json"} | (more or {}))
    SigV4Auth(Credentials(key, SECRET), "lambda", REGION).add_auth(request)
    fields = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    return f"POST {VMS} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {length}\r\n{fields}\r\n".encode()


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


def is_closed(sock: socket.socket) -> bool:
    """Whether its other end has been closed, without waiting."""
    sock.setblocking(False)
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


# ---- the body is not read for strangers ----


@pytest.mark.parametrize("wall", [True, False])
def test_a_strangers_body_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wall: bool) -> None:
    """A mebibyte is announced and none of it sent. Without the look at the head, the answer waits for the body's deadline."""
    if not wall:
        monkeypatch.setattr(sigv4, "check_head", lambda *one, **more: None)
    with rig(tmp_path, body_seconds=0.5) as api, connected(api.port) as sock:
        sock.sendall(signed_head(api.port, "AKIANOBODY", 1 << 20))
        said = sock.recv(4096)
        assert said.startswith(b"HTTP/1.1 403 " if wall else b"HTTP/1.1 408 "), said
        assert (b"UnrecognizedClientException" in said) is wall


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"Host": "elsewhere"}, b"403 "), ({"X-Amz-Content-Sha256": "0" * 64}, b"403 "), ({"X-Amz-Date": "20200101T000000Z"}, b"403 ")],
)
def test_what_the_head_tells_is_told_before_the_body(tmp_path: Path, fields: dict[str, str], text: bytes) -> None:
    """Another host than was signed, with the body's hash in the head; a hash that was not signed so; a time that is over."""
    with rig(tmp_path, body_seconds=30) as api, connected(api.port) as sock:
        head = signed_head(api.port, KEY, 1 << 20, {"X-Amz-Content-Sha256": "1" * 64})
        for name, value in fields.items():
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(name.lower().encode() + b":")]
            head = b"\r\n".join([lines[0], f"{name}: {value}".encode(), *lines[1:]])
        sock.sendall(head)
        assert text in sock.recv(4096)


def test_a_body_that_stands_still_is_answered(tmp_path: Path) -> None:
    """The control: a known key's whole body is read, and only one that does not come is refused."""
    with rig(tmp_path, body_seconds=0.5) as api, connected(api.port) as sock:
        sock.sendall(signed_head(api.port, KEY, 1 << 20) + b"{")
        assert b"408 " in sock.recv(4096)
        large = b" " * 900_000 + b'{"imageIdentifier": "arn:aws:lambda:us-east-1:123456789012:microvm-image:none"}'
        assert api.raw("POST", VMS, large)[0] == 404


def test_large_bodies_are_few_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.api.server._LARGE_BODIES", 2)
    with rig(tmp_path, body_seconds=PATIENCE) as api, contextlib.ExitStack() as stack:
        for _ in range(2):
            sock = stack.enter_context(connected(api.port))
            sock.sendall(signed_head(api.port, KEY, 1 << 20) + b"{")
        wait_for(lambda: _large(api) == 2)
        third = stack.enter_context(connected(api.port))
        third.sendall(signed_head(api.port, KEY, 1 << 20))
        assert b"429 " in third.recv(4096)
        assert api.client().list_microvms()["items"] == [], "small ones pass"


def _large(api: ApiRig) -> int:
    server = next(route.handler.__self__ for route in api._runner.app.router.routes())
    return int(server._large_bodies)


def wait_for(check: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- connections that say nothing ----


@pytest.mark.parametrize(("most", "closed"), [(16, True), (4096, False)])
def test_silent_connections_make_room(tmp_path: Path, most: int, closed: bool) -> None:
    """Sixty connections say nothing. With a bound of sixteen the first of them are closed for those that come; without one, all of them
    hold a descriptor each."""
    with rig(tmp_path, connections=most, head_seconds=600) as api, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(api.port)) for _ in range(60)]
        assert api.client().list_microvms()["items"] == [], "who has something to say is served"
        wait_for(lambda: is_closed(silent[0]) if closed else len(api.connections) >= 60)
        assert len(api.connections) <= 16 or not closed
        assert is_closed(silent[0]) is closed and not is_closed(silent[-1])


def ask(connection: http.client.HTTPConnection, port: int) -> int:
    request = AWSRequest("GET", f"http://127.0.0.1:{port}{VMS}")
    SigV4Auth(Credentials(KEY, SECRET), "lambda", REGION).add_auth(request)
    connection.request("GET", VMS, headers=dict(request.prepare().headers))
    answer = connection.getresponse()
    answer.read()
    return answer.status


def test_who_has_shown_who_he_is_stays(tmp_path: Path) -> None:
    """His connection is older than any of the silent ones, and is still his."""
    with rig(tmp_path, connections=16, head_seconds=600) as api, contextlib.ExitStack() as stack:
        kept = http.client.HTTPConnection("127.0.0.1", api.port, timeout=PATIENCE)
        assert ask(kept, api.port) == 200
        mine = kept.sock
        silent = [stack.enter_context(connected(api.port)) for _ in range(40)]
        wait_for(lambda: is_closed(silent[0]))
        assert ask(kept, api.port) == 200 and kept.sock is mine
        kept.close()


@pytest.mark.parametrize("wall", [True, False])
def test_a_call_whose_body_is_on_its_way_is_under_way(tmp_path: Path, wall: bool) -> None:
    """Its head has the body's hash, and so a whole signature. Without the hash it has shown nothing yet, and is the oldest."""
    body = b" " * 100 + b'{"imageIdentifier": "arn:aws:lambda:us-east-1:123456789012:microvm-image:none"}'
    said = {"X-Amz-Content-Sha256": hashlib.sha256(body).hexdigest()} if wall else {}
    with rig(tmp_path, connections=16, head_seconds=600) as api, contextlib.ExitStack() as stack:
        mine = stack.enter_context(connected(api.port))
        mine.sendall(signed_head(api.port, KEY, len(body), said, body) + body[:50])
        wait_for(lambda: len(api.connections._busy) == 1 if wall else api.connections._unverified)
        silent = [stack.enter_context(connected(api.port)) for _ in range(40)]
        wait_for(lambda: is_closed(silent[0]))
        assert is_closed(mine) is not wall
        if wall:
            mine.settimeout(PATIENCE)
            mine.sendall(body[50:])
            assert b"404 " in mine.recv(4096)


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ("192.0.2.1", "192.0.2.1", True), ("192.0.2.1", "192.0.2.2", False), ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:1:2:3", True), ("2001:db8::1", "2001:db8:0:1::1", False), ("fe80::1%lo", "fe80::2%lo", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
    ],
)  # fmt: skip
def test_whose_connections_are_counted_together(first: str, second: str, together: bool) -> None:
    assert (connections.holder(first) == connections.holder(second)) is together


async def test_who_goes_first() -> None:
    """The oldest that has shown nothing, then the one that has waited longest between requests, and never a call under way."""
    ended: list[str] = []
    some = Connections(most=3, most_per_peer=2, head_seconds=600)

    def admit(name: str) -> connections.Visit | None:
        return some.admit(name[0], lambda: ended.append(name))

    first, second = admit("a1"), admit("a2")
    assert first and second
    for visit in (first, second):  # verified, and under way
        some._drop(visit)
        some._busy.add(visit)
        visit.is_verified = True
    assert admit("a3") is None and not ended, "both of this peer's are calls under way"
    assert admit("b1") and admit("c1") and ended == ["b1"], "all three are taken: the oldest that has shown nothing goes"
    some._answered(second)
    assert admit("a3") and ended == ["b1", "a2"], "of a peer at its bound, its own goes"
    for visit in list(some._unverified):
        some.leave(visit)
    some.leave(first)
    assert len(some) == 0 and not some._of_peer


@pytest.mark.parametrize("sends", [b"", b"POST / HTTP/1.1\r\nHost: x\r\n"])
@pytest.mark.parametrize("wall", [True, False])
def test_a_head_has_a_deadline(tmp_path: Path, sends: bytes, wall: bool) -> None:
    with rig(tmp_path, head_seconds=0.3 if wall else 600) as api, connected(api.port) as sock:
        kept = http.client.HTTPConnection("127.0.0.1", api.port, timeout=PATIENCE)
        assert ask(kept, api.port) == 200
        sock.sendall(sends)
        if wall:
            assert sock.recv(1) == b"", "closed, and nothing said"
            time.sleep(0.4)
            assert ask(kept, api.port) == 200, "one that has shown who it is waits longer than that between requests"
        else:
            sock.settimeout(0.6)
            with pytest.raises(TimeoutError):
                sock.recv(1)
        kept.close()


# ---- TLS ----


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """An instance's own authority, and the API's certificate by it."""
    root = tmp_path_factory.mktemp("tls")
    settings = Settings(root=root, api={"tls": True, "names": ["api.example"]}, users={"first": max(os.getuid(), 1000)})  # type: ignore[arg-type]
    settings.tls_dir.mkdir()
    settings.aws_dir.mkdir()
    instance.make_certificates(settings)
    return settings


def context(settings: Settings) -> ssl.SSLContext:
    return Certificate(settings.tls_dir / "api.crt", settings.tls_dir / "api.key").context


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="keys belong to users of the service's")


def client(port: int, verify: str | bool) -> Any:
    return boto3.client(
        "lambda-microvms", region_name=REGION, endpoint_url=f"https://127.0.0.1:{port}", aws_access_key_id=KEY, aws_secret_access_key=SECRET,
        verify=verify, config=Config(retries={"max_attempts": 0}, read_timeout=PATIENCE),
    )  # fmt: skip


@needs_root
def test_boto3_and_aws_speak_tls_with_the_bundle(tmp_path: Path, authority: Settings) -> None:
    """And with the system's authorities alone they refuse: it is the certificate that they believe."""
    bundle = str(authority.tls_dir / "bundle.crt")
    with rig(tmp_path, tls=context(authority)) as api:
        assert client(api.port, bundle).list_microvms()["items"] == []
        with pytest.raises(SSLError, match="CERTIFICATE_VERIFY_FAILED"):
            client(api.port, "/etc/ssl/certs/ca-certificates.crt").list_microvms()
        served = authority.model_copy(update={"api": authority.api.model_copy(update={"port": api.port, "names": []})})
        instance.write_aws_profile(served, KEY, SECRET)
        places = {
            name: value
            for name, value in instance.environment(served).items()
            if name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
        }
        aws = subprocess.run(
            [Path(sys.prefix) / "bin/aws", "lambda-microvms", "list-microvms"], env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | places,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert json.loads(aws.stdout) == {"items": []}, aws.stderr


@needs_root
def test_boto3_signs_its_bodies_and_not_in_the_head(tmp_path: Path, authority: Settings) -> None:
    """Over TLS too, where it leaves those for S3 unsigned: nothing in its heads can be verified before the body is there."""
    heads: list[dict[str, Any]] = []
    with rig(tmp_path, tls=context(authority)) as api:
        one = client(api.port, str(authority.tls_dir / "bundle.crt"))
        one.meta.events.register("before-send.lambda-microvms", lambda request, **_: heads.append(dict(request.headers)))
        with pytest.raises(ClientError, match="ResourceNotFound"):
            one.run_microvm(imageIdentifier="arn:aws:lambda:us-east-1:123456789012:microvm-image:none")
    (head,) = heads
    assert "authorization" in {name.lower() for name in head} and sigv4.BODY_HASH not in {name.lower() for name in head}


@needs_root
def test_a_policy_may_ask_for_tls(tmp_path: Path, authority: Settings) -> None:
    """aws:SecureTransport says what the connection is."""
    policy = {"Statement": [
        {"Effect": "Allow", "Action": "*", "Resource": "*"},
        {"Effect": "Deny", "Action": "*", "Resource": "*", "Condition": {"Bool": {"aws:SecureTransport": "false"}}},
    ]}  # fmt: skip
    for tls, status in ((context(authority), 200), (None, 403)):
        with rig(tmp_path / str(status), tls=tls) as api:
            key = api.do(api.accounts.create_key("123456789012", "ann", policy))
            kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
            trusts = {"context": ssl.create_default_context(cafile=str(authority.tls_dir / "ca.crt"))} if tls else {}
            connection = kind("127.0.0.1", api.port, timeout=PATIENCE, **trusts)
            request = AWSRequest("GET", f"{'https' if tls else 'http'}://127.0.0.1:{api.port}{VMS}")
            SigV4Auth(Credentials(key.id, key.secret), "lambda", REGION).add_auth(request)
            connection.request("GET", VMS, headers=dict(request.prepare().headers))
            assert connection.getresponse().status == status
            connection.close()


@needs_root
@pytest.mark.parametrize("sends", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes([22, 3, 1, 2, 0, 1])])
def test_no_handshake_holds_a_connection(tmp_path: Path, authority: Settings, sends: bytes) -> None:
    """Silence, plain HTTP, half a ClientHello."""
    with rig(tmp_path, tls=context(authority), head_seconds=0.5) as api, connected(api.port) as sock:
        sock.sendall(sends)
        with contextlib.suppress(ConnectionError):
            while said := sock.recv(4096):
                assert not said.startswith(b"HTTP"), said
        wait_for(lambda: len(api.connections) == 0)
        assert client(api.port, str(authority.tls_dir / "bundle.crt")).list_microvms()["items"] == []


@needs_root
def test_silent_handshakes_make_room_too(tmp_path: Path, authority: Settings) -> None:
    with rig(tmp_path, tls=context(authority), connections=16, head_seconds=600) as api, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(api.port)) for _ in range(40)]
        assert client(api.port, str(authority.tls_dir / "bundle.crt")).list_microvms()["items"] == []
        assert is_closed(silent[0]) and not is_closed(silent[-1])


@needs_root
def test_a_new_certificate_needs_no_restart(tmp_path: Path) -> None:
    settings = Settings(root=tmp_path, api={"tls": True}, users={"first": max(os.getuid(), 1000)})  # type: ignore[arg-type]
    settings.tls_dir.mkdir()
    instance.make_certificates(settings)
    served = Certificate(settings.tls_dir / "api.crt", settings.tls_dir / "api.key")
    with rig(tmp_path, tls=served.context) as api:

        def shown() -> bytes:
            plain = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            plain.check_hostname, plain.verify_mode = False, ssl.CERT_NONE
            with plain.wrap_socket(connected(api.port)) as sock:
                return sock.getpeercert(binary_form=True) or b""

        before = shown()
        (settings.tls_dir / "api.crt").unlink()
        instance.make_certificates(settings)
        served._renew()
        assert shown() != before
        (settings.tls_dir / "api.crt").write_text("half")
        with pytest.raises(OSError):
            served._renew()
        assert shown() != before, "the last good one goes on"


@needs_root
@pytest.mark.parametrize("key", ["old", "empty"])
def test_half_of_a_new_certificate_is_not_served(tmp_path: Path, key: str) -> None:
    """A new chain has come and its key not yet, or a key without anything in it: the pair that was served before is served on."""
    settings = Settings(root=tmp_path, api={"tls": True}, users={"first": max(os.getuid(), 1000)})  # type: ignore[arg-type]
    settings.tls_dir.mkdir()
    instance.make_certificates(settings)
    chain, secret = settings.tls_dir / "api.crt", settings.tls_dir / "api.key"
    served = Certificate(chain, secret)
    old_key = secret.read_bytes()
    before = served_by(served.context)
    chain.unlink()
    instance.make_certificates(settings)
    new_key = secret.read_bytes()
    assert new_key != old_key
    secret.write_bytes(old_key if key == "old" else b"")
    with pytest.raises(OSError):
        served._renew()
    assert served_by(served.context) == before
    secret.write_bytes(new_key)
    served._renew()
    assert served_by(served.context) == ssl.PEM_cert_to_DER_cert(chain.read_text()), "the whole pair is"


def served_by(context: ssl.SSLContext) -> bytes:
    """Returns the certificate that a client is shown. Raises ssl.SSLError where no handshake succeeds."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    client, server = trusting.wrap_bio(to_client, to_server), context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for end in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return client.getpeercert(binary_form=True) or b""


# ---- beyond loopback ----

TOKEN = "a-token-of-24-characters"


@pytest.mark.parametrize(
    ("api", "said"),
    [
        ({"address": "0.0.0.0"}, r"api\.address 0\.0\.0\.0 is beyond loopback.*set api\.tls"),
        ({"address": "192.0.2.7"}, r"set api\.tls"), ({"address": "host.example"}, r"set api\.tls"), ({"address": "::"}, r"set api\.tls"),
        ({"metrics_address": "0.0.0.0"}, r"api\.metrics_address .*set api\.tls and api\.metrics_token_file"),
        ({"metrics_address": "0.0.0.0", "tls": True}, "api.metrics_token_file"),
        ({"metrics_address": "0.0.0.0", "metrics_token_file": "/x"}, "api.tls"),
        ({"certificate": "/x", "tls": True}, "go together"), ({"certificate": "/x", "key": "/y"}, r"api\.certificate is for api\.tls"),
    ],
)  # fmt: skip
def test_nothing_is_served_in_the_clear_beyond_loopback(tmp_path: Path, api: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        config.load(root=tmp_path, api=api)
    assert "\n" not in str(caught.value)


def test_what_may_be_served_is(tmp_path: Path) -> None:
    for api in (
        {}, {"address": "127.0.0.9"}, {"address": "::1"}, {"address": "localhost"}, {"address": "0.0.0.0", "tls": True},
        {"address": "0.0.0.0", "tls": True, "metrics_address": "0.0.0.0", "metrics_token_file": "/x"},
    ):  # fmt: skip
        config.load(root=tmp_path, api=api)


async def test_a_socket_that_others_reach_is_not_served_in_the_clear(tmp_path: Path) -> None:
    """One that an earlier service had opened, under other settings, and that was taken over with it."""
    runner = web.AppRunner(web.Application())
    await runner.setup()
    assert runner.server is not None
    for address, is_refused in (("0.0.0.0", True), ("127.0.0.1", False)):
        sock = listeners.listen(address, 0, "api")
        if is_refused:
            with pytest.raises(ConfigError, match="beyond loopback"):
                Listener(sock, runner.server, Connections(16, 8, 1), None)
            sock.close()
        else:
            await Listener(sock, runner.server, Connections(16, 8, 1), None).close()
    await runner.cleanup()


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (f"{TOKEN}\n", 0o644, "may be read by others"), (f"{TOKEN}\n", 0o640, "chmod 600"), ("short\n", 0o600, "16 letters"),
        ("", 0o600, "16 letters"), ("two words of a token\n", 0o600, "one line"), (f"{TOKEN}\n", 0o600, ""),
    ],
)  # fmt: skip
def test_the_metrics_token_is_its_readers_alone(tmp_path: Path, content: str, mode: int, said: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(mode)
    if not said:
        assert instance.metrics_token(path) == TOKEN.encode()
        return
    with pytest.raises(ConfigError, match=said):
        instance.metrics_token(path)
    with pytest.raises(ConfigError, match="No such file"):
        instance.metrics_token(tmp_path / "none")


async def test_metrics_want_the_token(tmp_path: Path, aiohttp_client: Any) -> None:
    """Health says no more than yes or no without it."""
    path = tmp_path / "metrics.token"

    async def nothing() -> dict[str, Any]:
        return {}

    async def served(scrapers: Scrapers) -> Any:
        made = metrics.application(list, nothing, nothing, scrapers.may_read)
        health.application(made, lambda: {"control": (True, "serves")}, nothing, scrapers.may_read)
        return await aiohttp_client(made)

    guarded = await served(Scrapers(path))
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert (await guarded.get("/metrics", headers=right)).status == 401, "a file that is not there opens nothing"
    path.write_text(TOKEN)
    for headers in (
        {},
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {TOKEN}x"},
    ):
        assert (await guarded.get("/metrics", headers=headers)).status == 401, headers
    answer = await guarded.get("/metrics", headers=right)
    assert answer.status == 200 and "torpor_sessions" in await answer.text()
    assert await (await guarded.get("/healthz")).json() == {"ok": True}
    assert "checks" in await (await guarded.get("/healthz", headers=right)).json()
    path.write_text("")
    assert (await guarded.get("/metrics", headers={"Authorization": "Bearer "})).status == 401, "nor does an empty one"
    open_to_all = await served(Scrapers(None))
    assert (await open_to_all.get("/metrics")).status == 200, "the control: on loopback, without a token"
