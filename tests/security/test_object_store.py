"""The wall around artifacts: a bucket is its account's, and the embedded store serves nobody who has not signed.

Taken away by name: the `Guard` before moto (gateway/objectstore.py), moto's own look at a bucket's owner, `object_store.buckets`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from service import until

from gateway import config, instance, listeners, objectstore, storebody, storechunks
from gateway import messages as m
from gateway.accounts.directory import Directory
from gateway.api import sigv4
from gateway.api.sigv4 import signing_key
from gateway.api.store_keys import StoreKeys
from gateway.config import ConfigError, Settings
from gateway.images.artifact import BuildFailed, fetch
from gateway.images.pipeline import Pipeline
from gateway.sessions.store import Store

A, B = "111111111111", "222222222222"
KEYS = {"AKIAALICE": (A, "secret-a"), "AKIABOB": (B, "secret-b")}


def find(asked: m.StoreKeyRequest) -> m.StoreKey | None:
    if asked.key not in KEYS:
        return None
    account, secret = KEYS[asked.key]
    return m.StoreKey(account, signing_key(secret, asked.day, asked.region, "s3"), asked.action not in DENIED)


DENIED: set[str] = set()
NOTHING = re.compile("(?!)")


class Rig:
    """`guard` may be taken away."""

    def __init__(self, guard: bool = True, known: Any = find, most: int = 64, head_seconds: float = 60.0) -> None:
        served: Any = objectstore.Guard(objectstore.s3(), known) if guard else objectstore.s3()
        sock = listeners.listen("127.0.0.1", 0, "store")
        self.port = int(sock.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._counting = threading.Thread(target=self._loop.run_forever)
        self._counting.start()
        self._server = objectstore.make_server(sock, served, self._loop, most, head_seconds)
        sock.detach()
        self._server.daemon_threads = False  # the end waits for them: they say theirs to the loop
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._counting.join()
        self._loop.close()

    def client(self, key: str, secret: str = "", style: str = "path") -> Any:
        return boto3.client(
            "s3", region_name="us-east-1", endpoint_url=f"http://127.0.0.1:{self.port}", aws_access_key_id=key,
            aws_secret_access_key=secret or KEYS.get(key, ("", "x"))[1],
            config=Config(retries={"max_attempts": 0}, s3={"addressing_style": style}, signature_version="s3v4"),
        )  # fmt: skip

    def raw(self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@pytest.fixture
def bucket() -> str:
    return f"apps-{time.monotonic_ns()}"


@pytest.fixture
def store(bucket: str) -> Iterator[Rig]:
    """With a bucket of account A's, and an artifact in it."""
    one = Rig()
    alice = one.client("AKIAALICE")
    alice.create_bucket(Bucket=bucket)
    alice.put_object(Bucket=bucket, Key="app one+ü.zip", Body=b"alice's")
    yield one
    one.close()


def code(work: Any) -> str:
    try:
        work()
    except ClientError as error:
        found = error.response["Error"]["Code"]
        return {"403": "AccessDenied"}.get(found, found)  # a HEAD's answer has a number alone
    return ""


# ---- who has not signed ----


@pytest.mark.parametrize("guard", [True, False])
def test_nobody_is_served_who_has_not_signed(bucket: str, guard: bool) -> None:
    """A local user reads and replaces an artifact without a key, or with one that he has made up: moto takes any, and before, so did we."""
    one = Rig(guard)
    made_up = {
        "Authorization": f"AWS4-HMAC-SHA256 Credential=me/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature={'0' * 64}"
    }
    try:
        made = one.raw("PUT", f"/{bucket}")[0], one.raw("PUT", f"/{bucket}/app.zip", body=b"evil")[0]
        assert made == ((403, 403) if guard else (200, 200))
        status, said = one.raw("GET", f"/{bucket}/app.zip", made_up)
        assert (status == 200 and said == b"evil") is not guard
    finally:
        one.close()


@pytest.mark.parametrize("path", ["/moto-api/reset", "/moto-api/state-manager/set-transition", "/", "/latest/meta-data"])
def test_what_steers_moto_is_nobodys(store: Rig, bucket: str, path: str) -> None:
    assert store.raw("POST", path)[0] == 403
    request = AWSRequest("POST", f"http://127.0.0.1:{store.port}{path}", headers={"X-Amz-Content-SHA256": "UNSIGNED-PAYLOAD"})
    SigV4Auth(Credentials("AKIABOB", "secret-b"), "s3", "us-east-1").add_auth(request)
    store.raw("POST", path, dict(request.prepare().headers))
    assert store.client("AKIAALICE").list_buckets()["Buckets"], "nothing was reset, whoever signed"


def test_a_wrong_or_unknown_key_is_none(store: Rig) -> None:
    assert code(store.client("AKIAALICE", "guessed").list_buckets) == "SignatureDoesNotMatch"
    assert code(store.client("AKIANOBODY").list_buckets) == "InvalidAccessKeyId"


def test_a_signature_is_for_s3_its_time_and_its_request(store: Rig, bucket: str) -> None:
    for service, stamp, path in (("sts", "", "/"), ("s3", "20200101T000000Z", "/"), ("s3", "", f"/{bucket}/other")):
        request = AWSRequest("GET", f"http://127.0.0.1:{store.port}/", headers={"X-Amz-Content-SHA256": "UNSIGNED-PAYLOAD"})
        SigV4Auth(Credentials("AKIAALICE", "secret-a"), service, "us-east-1").add_auth(request)
        headers = dict(request.prepare().headers) | ({"X-Amz-Date": stamp} if stamp else {})
        assert store.raw("GET", path, headers)[0] == 403, (service, stamp, path)


def test_who_has_signed_is_served(store: Rig, bucket: str) -> None:
    """The control, with what SDKs sign in ways of their own: odd names, presigned URLs, uploads in parts, chunks with checksums."""
    alice = store.client("AKIAALICE")
    assert alice.get_object(Bucket=bucket, Key="app one+ü.zip")["Body"].read() == b"alice's"
    url = alice.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "app one+ü.zip"}, ExpiresIn=60)
    path = url.partition(f":{store.port}")[2]
    assert store.raw("GET", path) == (200, b"alice's")
    assert store.raw("GET", path.replace("X-Amz-Expires=60", "X-Amz-Expires=3600"))[0] == 403
    assert store.raw("DELETE", path)[0] == 403, "it was signed to read"
    for length in (0, 1, 9 << 20):  # the last one in parts
        with contextlib.closing(__import__("io").BytesIO(b"x" * length)) as body:
            alice.upload_fileobj(body, bucket, "large")
        assert alice.head_object(Bucket=bucket, Key="large")["ContentLength"] == length
    assert alice.list_objects_v2(Bucket=bucket)["KeyCount"] == 2
    alice.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "large"}, {"Key": "app one+ü.zip"}]})
    alice.delete_bucket(Bucket=bucket)


# ---- another account ----


def attempts(one: Rig, bucket: str) -> dict[str, str]:
    bob = one.client("AKIABOB")
    bob.create_bucket(Bucket=(mine := f"{bucket}-b"))
    key = "app one+ü.zip"
    return {
        "read": code(lambda: bob.get_object(Bucket=bucket, Key=key)),
        "read what is not there": code(lambda: bob.get_object(Bucket=bucket, Key="none")),
        "look": code(lambda: bob.head_object(Bucket=bucket, Key=key)),
        "list": code(lambda: bob.list_objects_v2(Bucket=bucket)),
        "copy out": code(lambda: bob.copy_object(Bucket=mine, Key="x", CopySource={"Bucket": bucket, "Key": key})),
        "write": code(lambda: bob.put_object(Bucket=bucket, Key=key, Body=b"evil")),
        "remove": code(lambda: bob.delete_object(Bucket=bucket, Key=key)),
        "open": code(lambda: bob.put_bucket_policy(Bucket=bucket, Policy='{"Statement": []}')),
        "remove the bucket": code(lambda: bob.delete_bucket(Bucket=bucket)),
    }


def test_a_bucket_is_its_accounts(store: Rig, bucket: str) -> None:
    """Also what is not there is refused: whether it is, is not said. Bob's list has his own buckets."""
    found = attempts(store, bucket)
    assert set(found.values()) == {"AccessDenied"}, found
    names = [one["Name"] for one in store.client("AKIABOB").list_buckets()["Buckets"]]
    assert f"{bucket}-b" in names and bucket not in names
    assert store.client("AKIAALICE").get_object(Bucket=bucket, Key="app one+ü.zip")["Body"].read() == b"alice's"


def test_without_the_look_at_its_owner_it_is_anybodys(store: Rig, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_ALLOW_CROSSACCOUNT_ACCESS", "true")
    found = attempts(store, bucket)
    assert found["read"] == found["list"] == found["copy out"] == found["write"] == ""


@pytest.mark.parametrize("field", [{"X-Moto-Account-Id": A}, {"Host": "{bucket}.s3.amazonaws.com"}])
def test_who_one_is_and_what_one_means_is_not_the_callers_to_say(store: Rig, bucket: str, field: dict[str, str]) -> None:
    """Fields by which moto takes another account, or another bucket than the path has. Bob signs them."""
    path = f"/{bucket}/app%20one%2B%C3%BC.zip" if "Host" not in field else "/app%20one%2B%C3%BC.zip"
    fields = {name: value.format(bucket=bucket) for name, value in field.items()}
    request = AWSRequest(
        "GET",
        f"http://{fields.get('Host', f'127.0.0.1:{store.port}')}{path}",
        headers=fields | {"X-Amz-Content-SHA256": "UNSIGNED-PAYLOAD"},
    )
    SigV4Auth(Credentials("AKIABOB", "secret-b"), "s3", "us-east-1").add_auth(request)
    status, said = store.raw("GET", path, dict(request.prepare().headers) | fields)
    assert status in (403, 404) and said != b"alice's", said


def test_a_key_that_was_taken_back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    known = dict(KEYS)
    guard = objectstore.Guard(lambda environ, start: [], lambda asked: find(asked) if asked.key in known else None, lambda: now)
    claimed: Any = SimpleNamespace(key="AKIABOB", token="", day="20260101", region="us-east-1")
    assert guard._key(claimed, "s3:GetObject", "x").account == B
    del known["AKIABOB"]
    now += objectstore._KNOWN_SECONDS + 1
    with pytest.raises(Exception, match="does not exist"):
        guard._key(claimed, "s3:GetObject", "x")


# ---- control's side ----


@pytest.fixture
async def directory(tmp_path: Path) -> Any:
    store = Store(tmp_path / "torpor.db")
    await store.open()
    made = Directory(store, A, {"AKIAROOT": "root-secret"}, b"s" * 32)
    yield made
    await store.close()


def request(key: str, token: str = "", action: str = "s3:GetObject", resource: str = "arn:aws:s3:::apps/app.zip") -> m.StoreKeyRequest:
    return m.StoreKeyRequest(key, token, "20260101", "us-east-1", action, resource)


async def test_control_says_who_a_key_is_and_gives_no_secret(directory: Directory) -> None:
    keys = StoreKeys(directory)
    await directory.create_account("other", B)
    bobs = await directory.create_key(B, "bob", None)
    role = directory.issue(f"arn:aws:iam::{B}:role/r", "vm", 900)
    assert keys.find(request("AKIAROOT")) == m.StoreKey(A, signing_key("root-secret", "20260101", "us-east-1", "s3"), True)
    found = keys.find(request(bobs.id))
    assert found is not None and found.account == B and bobs.secret.encode() not in found.signing
    found = keys.find(request(role.access_key, role.token))
    assert found is not None and found.account == B
    assert keys.find(request(role.access_key)) is None and keys.find(request("AKIANOBODY")) is None
    assert keys.find(request(role.access_key, directory.issue(f"arn:aws:iam::{A}:role/r", "vm", -1).token)) is None, "another's, and over"
    await directory.delete_key(bobs.id)
    assert keys.find(request(bobs.id)) is None


async def test_a_key_may_what_its_policy_allows(directory: Directory) -> None:
    """One without a policy may nothing, and a session no more than its own allows: in the account's buckets lies what its images are made of."""
    keys = StoreKeys(directory)

    def may(key: str, token: str = "", action: str = "s3:GetObject", name: str = "apps/app.zip") -> bool:
        found = keys.find(request(key, token, action, f"arn:aws:s3:::{name}"))
        return found is not None and found.is_allowed

    reads = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:Get*", "Resource": "arn:aws:s3:::apps/*"}]}
    nothing = await directory.create_key(A, "none", None)
    reader = await directory.create_key(A, "reader", reads)
    role = f"arn:aws:iam::{A}:role/r"
    await directory.put_role(role, {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]})
    wide, narrow = directory.issue(role, "me", 900), directory.issue(role, "me", 900, json.dumps(reads))
    assert may("AKIAROOT") and may("AKIAROOT", action="s3:PutObject") and not may(nothing.id)
    assert may(reader.id) and not may(reader.id, action="s3:PutObject") and not may(reader.id, name="others/app.zip")
    assert may(wide.access_key, wide.token, "s3:PutObject") and may(narrow.access_key, narrow.token)
    assert not may(narrow.access_key, narrow.token, "s3:PutObject")
    own = keys.own(A)
    assert may(own.access_key) and not may(own.access_key, action="s3:PutObject"), "control reads, and writes nothing"


@pytest.mark.parametrize(
    ("denied", "refused"),
    [
        ("s3:PutObject", {"put", "copy", "parts"}), ("s3:GetObject", {"get", "copy", "presigned"}), ("s3:DeleteObject", {"delete", "delete some"}),
        ("s3:ListBucket", {"list"}), ("s3:ListAllMyBuckets", {"buckets"}), ("s3:CreateBucket", {"make"}), ("s3:DeleteBucket", {"remove"}), ("s3:PutBucketPolicy", {"open"}),
        ("", set()),
    ],
)  # fmt: skip
def test_what_is_done_is_judged_as_what_it_is(store: Rig, bucket: str, denied: str, refused: set[str]) -> None:
    """Each call of a client's by its action; the last row, in which nothing is denied, is the control."""
    alice = store.client("AKIAALICE")
    alice.put_object(Bucket=bucket, Key="a", Body=b"1")
    url = alice.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "a"}).partition(f":{store.port}")[2]
    DENIED.add(denied)
    try:
        found = {
            "put": code(lambda: alice.put_object(Bucket=bucket, Key="b", Body=b"2")),
            "parts": code(lambda: alice.create_multipart_upload(Bucket=bucket, Key="c")),
            "get": code(lambda: alice.get_object(Bucket=bucket, Key="a")),
            "presigned": "" if store.raw("GET", url)[0] == 200 else "AccessDenied",
            "copy": code(lambda: alice.copy_object(Bucket=bucket, Key="d", CopySource={"Bucket": bucket, "Key": "a"})),
            "list": code(lambda: alice.list_objects_v2(Bucket=bucket)),
            "buckets": code(alice.list_buckets),
            "open": code(lambda: alice.put_bucket_policy(Bucket=bucket, Policy='{"Statement": []}')),
            "make": code(lambda: alice.create_bucket(Bucket=f"{bucket}-more")),
            "delete": code(lambda: alice.delete_object(Bucket=bucket, Key="a")),
            "delete some": code(lambda: alice.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "z"}]})),
            "remove": code(lambda: alice.delete_bucket(Bucket=f"{bucket}-more")),
        }
    finally:
        DENIED.clear()
    missing = {"remove"} if denied == "s3:CreateBucket" else set()  # there is none to remove then
    assert {name for name, said in found.items() if said == "AccessDenied"} == refused
    assert {name for name, said in found.items() if said not in ("", "AccessDenied")} == missing, found


def sign(one: Rig, method: str, target: str, headers: dict[str, str], body: bytes = b"") -> dict[str, str]:
    """Alice's signature over a target as it is on the request line."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    fields = {"host": f"127.0.0.1:{one.port}", "x-amz-date": stamp, "x-amz-content-sha256": hashlib.sha256(body).hexdigest()} | headers
    path, _, query = target.partition("?")
    claimed = sigv4.Signature("AKIAALICE", stamp[:8], "us-east-1", "s3", tuple(sorted(fields)), "", stamp, "")
    key = signing_key("secret-a", claimed.day, claimed.region, "s3")
    request = sigv4.SignedRequest(method, path, query, fields)
    digest = sigv4.signature(request, claimed, key, fields["x-amz-content-sha256"], path)
    scope = f"AKIAALICE/{claimed.day}/us-east-1/s3/aws4_request"
    signed = f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders={';'.join(claimed.signed)}, Signature={digest}"
    return fields | {"authorization": signed}


TAGS = b"<Tagging><TagSet><Tag><Key>k</Key><Value>v</Value></Tag></TagSet></Tagging>"


@pytest.mark.parametrize("wall", [True, False])
@pytest.mark.parametrize(
    ("method", "target", "source"),
    [
        ("GET", "x:/{hidden}/k", ""), ("GET", "/{hidden}#x/k", ""), ("PUT", "/{bucket}/c", "//{bucket}/{hidden}/k"),
        ("PUT", "/{bucket}/c", "http://x/{hidden}/k"), ("PUT", "/{bucket}/c", "x:/{hidden}/k"), ("POST", "/{hidden}?key=new", ""),
        ("GET", "/{hidden};x", ""), ("PUT", "/{hidden};x?tagging", ""), ("GET", "/;x", ""),
    ],
)  # fmt: skip
def test_what_is_judged_is_what_is_done(
    store: Rig, bucket: str, method: str, target: str, source: str, wall: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets and sources of copies that moto reads as URLs, and so as a bucket that was not asked about. The control takes the wall away."""
    if not wall:
        monkeypatch.setattr(objectstore, "_check_one_reading", lambda request: None)
    hidden = f"{bucket}-hidden"
    alice = store.client("AKIAALICE")
    alice.create_bucket(Bucket=hidden)
    alice.put_object(Bucket=hidden, Key="k", Body=b"hidden")
    target = target.format(bucket=bucket, hidden=hidden)
    headers = {"x-amz-copy-source": source.format(bucket=bucket, hidden=hidden)} if source else {}
    body = TAGS if "tagging" in target else b""
    status, said = store.raw(method, target, sign(store, method, target, headers, body), body)
    assert (400 <= status < 500) is wall, (status, said)


def keeps(resource: str, action: str = "s3:*") -> Any:
    """Everybody may everything but this."""

    def known(asked: m.StoreKeyRequest) -> m.StoreKey | None:
        found = find(asked)
        is_denied = asked.resource == resource and action in ("s3:*", asked.action)
        return m.StoreKey(found.account, found.signing, not is_denied) if found and is_denied else found

    return known


@pytest.fixture
def kept(bucket: str) -> Iterator[Rig]:
    """With two objects of account A's, of which nobody may touch `secret`."""
    everybody = Rig()
    everybody.client("AKIAALICE").create_bucket(Bucket=bucket)
    for key in ("secret", "public"):
        everybody.client("AKIAALICE").put_object(Bucket=bucket, Key=key, Body=b"a,b\n1,2\n")
    everybody.close()
    one = Rig(known=keeps(f"arn:aws:s3:::{bucket}/secret"))
    yield one
    one.close()


def left(one: Rig, bucket: str) -> set[str]:
    return {found["Key"] for found in one.client("AKIAALICE").list_objects_v2(Bucket=bucket).get("Contents", [])}


OBJECT = "<Object><Key>{}</Key></Object>"
FORM = '--x\r\nContent-Disposition: form-data; name="{}"; filename="f"\r\n\r\n<Delete>{}</Delete>\r\n--x--\r\n'


@pytest.mark.parametrize("wall", [True, False])
@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (f"<Delete>{OBJECT.format('secret')}</Delete>", ""), (f"<Delete>{OBJECT.format('public') + OBJECT.format('secret')}</Delete>", ""),
        (f"<Delete>{OBJECT.format('&#115;ecre<!-- -->t')}</Delete>", ""), (f"<Delete>{OBJECT.format('<![CDATA[secret]]>')}</Delete>", ""),
        ("<Delete><Object><Key>secret</Key><VersionId>null</VersionId></Object></Delete>", ""),
        (FORM.format("file", OBJECT.format("secret")), "multipart/form-data; boundary=x"),
    ],
)  # fmt: skip
def test_each_key_that_is_removed_is_judged(
    kept: Rig, bucket: str, body: str, kind: str, wall: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside others, written in other ways, or where moto alone would find it. The control judges the list as one resource."""
    if not wall:
        monkeypatch.setattr(objectstore, "_removes_many", lambda request: False)
        monkeypatch.setattr(objectstore, "_check_one_reading", lambda request: None)
        monkeypatch.setattr(objectstore, "_FORM", NOTHING)
    target = f"/{bucket}?delete"
    kept.raw("POST", target, sign(kept, "POST", target, {"content-type": kind} if kind else {}, body.encode()), body.encode())
    assert ("secret" in left(kept, bucket)) is wall
    if wall:
        assert "public" in left(kept, bucket), "all or nothing"


def test_which_version_is_removed_is_judged_as_that(bucket: str) -> None:
    asked: list[tuple[str, str]] = []
    one = Rig(known=lambda wanted: asked.append((wanted.action, wanted.resource)) or find(wanted))
    try:
        objects = [{"Key": "a b&<\u00fc"}, {"Key": "a", "VersionId": "7"}]
        code(lambda: one.client("AKIAALICE").delete_objects(Bucket=bucket, Delete={"Objects": objects}))
        arn = f"arn:aws:s3:::{bucket}/"
        assert asked[1:] == [("s3:DeleteObject", f"{arn}a b&<\u00fc"), ("s3:DeleteObjectVersion", f"{arn}a")]
    finally:
        one.close()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", b"MalformedXML"), ("<Delete></Delete>", b"MalformedXML"), ("<Delete><Object></Object></Delete>", b"MalformedXML"),
        ("<Delete><Object><Key>public</Key><Key>secret</Key></Object></Delete>", b"MalformedXML"),
        ("<Delete><Object><Key><x>secret</x></Key></Object></Delete>", b"MalformedXML"), ("<!DOCTYPE Delete><Delete/>", b"MalformedXML"),
        (f'<!DOCTYPE d [<!ENTITY k "secret">]><Delete>{OBJECT.format("&k;")}</Delete>', b"MalformedXML"),
        (f"<Delete>{OBJECT.format('k') * 1001}</Delete>", b"MalformedXML"), (f"<Delete>{OBJECT.format('k' * 1025)}</Delete>", b"KeyTooLongError"),
        (f"<Delete>{' ' * (2 << 20)}</Delete>", b"MaxMessageLengthExceeded"), (f"<Delete>{OBJECT.format('public') * 1000}</Delete>", b"<Deleted>"),
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_judged_is_refused(kept: Rig, bucket: str, body: str, said: bytes) -> None:
    """The last row, the longest list there is, is the control."""
    target = f"/{bucket}?delete"
    status, answer = kept.raw("POST", target, sign(kept, "POST", target, {}, body.encode()), body.encode())
    assert status == (200 if said == b"<Deleted>" else 400) and said in answer, answer[:200]
    assert "secret" in left(kept, bucket)


@pytest.mark.parametrize("wall", [True, False])
def test_who_selects_reads(kept: Rig, bucket: str, wall: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may write an object and not read it asks for its rows. The control counts that as a write."""
    one = Rig(known=keeps(f"arn:aws:s3:::{bucket}/secret", "s3:GetObject"))
    if not wall:
        asks = objectstore.asks
        monkeypatch.setattr(objectstore, "asks", lambda method, path, query: asks("PUT" if method == "POST" else method, path, query))
    ways: dict[str, Any] = {"InputSerialization": {"CSV": {}}, "OutputSerialization": {"CSV": {}}}
    try:
        for key, is_refused in (("secret", wall), ("public", False)):
            call = {"Bucket": bucket, "Key": key, "Expression": "SELECT * FROM S3Object", "ExpressionType": "SQL"} | ways
            said = code(lambda call=call: list(one.client("AKIAALICE").select_object_content(**call)["Payload"]))
            assert said == ("AccessDenied" if is_refused else ""), key
        target = f"/{bucket}/new?select&uploads"
        assert one.raw("POST", target, sign(one, "POST", target, {}))[0] == 403, "moto would begin an upload"
    finally:
        one.close()


def chunk(body: str) -> bytes:
    return f"{len(body):x};chunk-signature={'0' * 64}\r\n{body}\r\n".encode()


STATUS = {b"NotImplemented": 501, b"SignatureDoesNotMatch": 403}
OTHER, IN_CHUNKS = b"evil", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"


@pytest.mark.parametrize("wall", [True, False])
@pytest.mark.parametrize(
    ("said", "body", "kind"),
    [
        (hashlib.sha256(b"good").hexdigest(), OTHER, b"XAmzContentSHA256Mismatch"), (hashlib.sha256(b"").hexdigest(), OTHER, b"XAmzContentSHA256Mismatch"),
        (IN_CHUNKS, chunk("evil") + chunk(""), b"SignatureDoesNotMatch"), (f"{IN_CHUNKS}-TRAILER", chunk("evil") + chunk(""), b"NotImplemented"),
        ("whatever", OTHER, b"InvalidArgument"),
    ],
)  # fmt: skip
def test_a_body_is_the_one_that_was_signed(
    store: Rig, bucket: str, said: str, body: bytes, kind: bytes, wall: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody on the way puts another body into a request that Alice has signed. The control takes the wall away."""
    if not wall:
        monkeypatch.setattr(storebody, "check_form", lambda said, is_query_form: None)
        monkeypatch.setattr(storebody, "hold", lambda environ, said, chain, room: None)
    target = f"/{bucket}/swapped"
    fields = {"x-amz-content-sha256": said} | ({"x-amz-decoded-content-length": "4"} if said.startswith(IN_CHUNKS) else {})
    status, answer = store.raw("PUT", target, sign(store, "PUT", target, fields), body)
    assert status == (STATUS.get(kind, 400) if wall else 200) and (kind in answer) is wall, answer
    read = code(lambda: store.client("AKIAALICE").get_object(Bucket=bucket, Key="swapped"))
    assert read == ("NoSuchKey" if wall else "")


def in_chunks(one: Rig, target: str, chunks: list[bytes], length: int) -> tuple[dict[str, str], list[bytes]]:
    """Alice's signed request, and its chunks as they are sent."""
    fields = {"x-amz-content-sha256": IN_CHUNKS, "content-encoding": "aws-chunked", "x-amz-decoded-content-length": str(length)}
    fields = sign(one, "PUT", target, fields)
    claimed = sigv4.parse(sigv4.SignedRequest("PUT", target, "", fields))
    chain, before, sent = storechunks.Chain(claimed, signing_key("secret-a", claimed.day, "us-east-1", "s3")), claimed.digest, []
    for data in [*chunks, b""]:
        before = chain._signature(before, data)
        sent.append(f"{len(data):x};chunk-signature={before}\r\n".encode() + data + b"\r\n")
    return fields, sent


def test_chunks_are_signed_as_the_documentations_example_is() -> None:
    """S3 API Reference, "Example Calculations": 66560 letters in two chunks."""
    seed = "4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9"
    claimed = sigv4.Signature("AKIAIOSFODNN7EXAMPLE", "20130524", "us-east-1", "s3", (), seed, "20130524T000000Z", "")
    chain = storechunks.Chain(claimed, signing_key("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "20130524", "us-east-1", "s3"))
    signatures = (
        "ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648",
        "0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497",
        "b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9",
    )
    chunks = (b"a" * 65536, b"a" * 1024, b"")
    sent = b"".join(
        f"{len(data):x};chunk-signature={one}\r\n".encode() + data + b"\r\n" for data, one in zip(chunks, signatures, strict=True)
    )
    assert len(sent) == 66824 and b"".join(chain.read(io.BytesIO(sent))) == b"a" * 66560


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda sent: sent, b""),
        (lambda sent: [sent[0].replace(b"good", b"evil"), *sent[1:]], b"SignatureDoesNotMatch"),
        (lambda sent: [sent[1], sent[0], sent[2]], b"SignatureDoesNotMatch"),
        (lambda sent: [sent[0], sent[0], *sent[1:]], b"SignatureDoesNotMatch"),
        (lambda sent: [sent[0], sent[2]], b"SignatureDoesNotMatch"),
        (lambda sent: sent[:2], b"SignatureDoesNotMatch"),
        (lambda sent: [*sent, b"more"], b"SignatureDoesNotMatch"),
        (lambda sent: [b"ffffffff" + sent[0][1:]], b"SignatureDoesNotMatch"),
        (lambda sent: [], b"SignatureDoesNotMatch"),
    ],
)
def test_a_body_in_chunks_is_the_one_that_was_signed(store: Rig, bucket: str, change: Any, kind: bytes) -> None:
    """Chunks that are changed, swapped, doubled, left out, cut off or added. The first row, in which none is, is the control."""
    target = f"/{bucket}/parts"
    fields, sent = in_chunks(store, target, [b"good", b" one"], 8)
    status, answer = store.raw("PUT", target, fields, b"".join(change(sent)))
    assert status == (403 if kind else 200) and kind in answer, answer
    if not kind:
        found = store.client("AKIAALICE").get_object(Bucket=bucket, Key="parts")
        assert found["Body"].read() == b"good one" and "ContentEncoding" not in found
    else:
        assert code(lambda: store.client("AKIAALICE").get_object(Bucket=bucket, Key="parts")) == "NoSuchKey"


def test_chunks_have_the_length_that_was_signed(store: Rig, bucket: str) -> None:
    target = f"/{bucket}/parts"
    fields, sent = in_chunks(store, target, [b"good"], 5)
    status, answer = store.raw("PUT", target, fields, b"".join(sent))
    assert status == 400 and b"IncompleteBody" in answer


def test_a_list_of_keys_is_the_one_that_was_signed(kept: Rig, bucket: str) -> None:
    target, body = f"/{bucket}?delete", f"<Delete>{OBJECT.format('public')}</Delete>".encode()
    signed = sign(kept, "POST", target, {}, b"another")
    assert b"XAmzContentSHA256Mismatch" in kept.raw("POST", target, signed, body)[1] and "public" in left(kept, bucket)
    assert kept.raw("POST", target, sign(kept, "POST", target, {}, body), body)[0] == 200 and "public" not in left(kept, bucket)


def test_a_field_says_what_the_bodys_hash_is(store: Rig, bucket: str) -> None:
    """As S3 wants it in a request that is signed in its fields."""
    fields = sign(store, "GET", f"/{bucket}", {"x-amz-content-sha256": "UNSIGNED-PAYLOAD"})
    assert store.raw("GET", f"/{bucket}", fields)[0] == 200
    del fields["x-amz-content-sha256"]
    status, said = store.raw("GET", f"/{bucket}", fields)
    assert status == 400 and b"InvalidRequest" in said


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        ({"x-amz-content-sha256": "UNSIGNED-PAYLOAD"}, b"good"),
        ({"x-amz-content-sha256": hashlib.sha256(b"good").hexdigest()}, b"good"),
        ({"x-amz-content-sha256": hashlib.sha256(b"good" * (5 << 20)).hexdigest()}, b"good" * (5 << 20)),
        (
            {
                "x-amz-content-sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "x-amz-trailer": "x-amz-checksum-crc32",
                "content-encoding": "aws-chunked", "x-amz-decoded-content-length": "4",
            },
            b"4\r\ngood\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n",
        ),
    ],
    ids=["unsigned", "signed", "large", "trailer"],
)  # fmt: skip
def test_what_clients_say_of_bodies_is_taken(store: Rig, bucket: str, fields: dict[str, str], body: bytes) -> None:
    target = f"/{bucket}/new"
    assert store.raw("PUT", target, sign(store, "PUT", target, fields), body)[0] == 200
    read = store.client("AKIAALICE").get_object(Bucket=bucket, Key="new")["Body"].read()
    assert read == (b"good" if len(body) < 1000 else body)


def test_an_encoded_question_mark_is_the_keys() -> None:
    """What is asked about is the whole key that moto copies, and not what stands before it."""
    asked: list[str] = []
    one = Rig(known=lambda wanted: asked.append(wanted.resource) or find(wanted))
    try:
        one.raw("PUT", "/apps/c", sign(one, "PUT", "/apps/c", {"x-amz-copy-source": "apps/k%3Fsecret"}))
        assert asked == ["arn:aws:s3:::apps/c", "arn:aws:s3:::apps/k?secret"]
    finally:
        one.close()


def test_a_signature_of_other_letters_is_a_wrong_one(store: Rig, bucket: str) -> None:
    url = store.client("AKIAALICE").generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
    path = url.partition(f":{store.port}")[2].rpartition("=")
    assert store.raw("GET", f"{path[0]}=%C3%A9")[0] == 403


async def test_what_control_reads_with_is_no_key_of_the_api(directory: Directory) -> None:
    keys = StoreKeys(directory)
    own = keys.own(B)
    found = keys.find(request(own.access_key))
    assert found is not None and found.account == B and found.signing == signing_key(own.secret, "20260101", "us-east-1", "s3")
    assert directory.secret(own.access_key, "") is None
    assert StoreKeys(directory).own(B).secret != own.secret, "nor of another process's"


async def test_builds_read_their_accounts_buckets(directory: Directory, bucket: str, tmp_path: Path) -> None:
    """Account B names A's artifact in a build, from a store that knows both; A's own build is the control."""
    keys = StoreKeys(directory)
    one = Rig(known=lambda asked: keys.find(asked) or find(asked))
    try:
        one.client("AKIAALICE").create_bucket(Bucket=bucket)
        one.client("AKIAALICE").put_object(Bucket=bucket, Key="app.zip", Body=b"alice's")
        settings = Settings(root=tmp_path, object_store={"port": one.port}, account=A)  # type: ignore[arg-type]
        pipeline = Pipeline(settings, None, keys.own, lambda job: None, None)  # type: ignore[arg-type]
        for key in ("app.zip", "none.zip"):
            with pytest.raises(BuildFailed) as refused:
                fetch(settings, pipeline._account_reads(B, f"s3://{bucket}/{key}"), f"s3://{bucket}/{key}", tmp_path / "got")
            assert refused.value.code == "S3_ACCESS_DENIED", "there or not"
        assert fetch(settings, pipeline._account_reads(A, f"s3://{bucket}/app.zip"), f"s3://{bucket}/app.zip", tmp_path / "got") == 7
    finally:
        one.close()


@pytest.mark.parametrize(
    ("account", "name", "reads"),
    [
        (A, "anything", True),
        (A, "bobs", False),
        (B, "bobs", True),
        (B, "anything", False),
        (B, "both", True),
        (A, "both", True),
        (B, "bobs2", False),
    ],
)
async def test_another_store_is_asked_for_an_accounts_own_buckets_alone(tmp_path: Path, account: str, name: str, reads: bool) -> None:
    """It knows the operator's login alone, and would give it everything."""
    store = {"embedded": False, "endpoint": "http://store", "buckets": {B: ["bobs", "both"], A: ["both"]}}
    settings = Settings(root=tmp_path, object_store=store, account=A)  # type: ignore[arg-type]
    pipeline = Pipeline(settings, None, lambda account: account, lambda job: None, None)  # type: ignore[arg-type,return-value]
    if reads:
        assert pipeline._account_reads(account, f"s3://{name}/k") == account
    else:
        with pytest.raises(BuildFailed, match=f"S3_ACCESS_DENIED: s3://{name}/k may not be read by account {account}"):
            pipeline._account_reads(account, f"s3://{name}/k")


def test_the_readmes_commands_work_with_the_profile_of_the_service(store: Rig, bucket: str, tmp_path: Path) -> None:
    """`aws` as a user has it, with the profile that `torpor env` points at, and with another secret the refusal."""
    settings = Settings(root=tmp_path, object_store={"port": store.port})  # type: ignore[arg-type]
    settings.aws_dir.mkdir()
    instance.write_aws_profile(settings, "AKIAALICE", "secret-a")
    places = {name: value for name, value in instance.environment(settings).items() if name.startswith("AWS_C") or name.startswith("AWS_S")}
    del places["AWS_CA_BUNDLE"]
    (tmp_path / "app.zip").write_bytes(b"zip")

    def aws(*words: str) -> str:
        done = subprocess.run(
            [str(Path(sys.prefix) / "bin/aws"), "s3", *words], env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | places,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    assert f"make_bucket: {bucket}-2" in aws("mb", f"s3://{bucket}-2")
    assert "upload: " in aws("cp", str(tmp_path / "app.zip"), f"s3://{bucket}-2/app.zip")
    url = aws("presign", f"s3://{bucket}-2/app.zip").strip()
    assert store.raw("GET", url.partition(f":{store.port}")[2]) == (200, b"zip")
    instance.write_aws_profile(settings, "AKIAALICE", "guessed")
    assert "SignatureDoesNotMatch" in aws("ls")


def test_whose_buckets_are_is_said_by_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"object_store\.buckets: .*team-blue is no account's number"):
        config.load(root=tmp_path, object_store={"buckets": {"team-blue": ["theirs"]}})


# ---- versions ----


def as_object(method: str, path: str, query: str, judge: Any = objectstore.asks) -> tuple[str, str]:
    action, resource = judge(method, path, query)
    return action.removesuffix("Version"), resource


@pytest.mark.parametrize("wall", [True, False])
@pytest.mark.parametrize(
    ("denied", "method", "target", "source"),
    [
        ("s3:DeleteObjectVersion", "DELETE", "/{bucket}/a?versionId={version}", ""),
        ("s3:DeleteObjectVersion", "DELETE", "/{bucket}/a?x&versionId={version}", ""),
        ("s3:DeleteObjectVersion", "DELETE", "/{bucket}/a?%76ersionId={version}", ""),
        ("s3:GetObjectVersion", "HEAD", "/{bucket}/a?versionId={version}", ""),
        ("s3:GetObjectVersion", "GET", "/{bucket}/a?versionId={version}", ""),
        ("s3:GetObjectVersion", "PUT", "/{bucket}/b", "{bucket}/a?versionId={version}"),
    ],
)  # fmt: skip
def test_who_may_not_touch_versions_does_not(
    bucket: str, denied: str, method: str, target: str, source: str, wall: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was overwritten or removed is kept as a version, and to read or to end that is an action of its own. The control judges it
    as the object."""
    one = Rig()
    try:
        alice = one.client("AKIAALICE")
        alice.create_bucket(Bucket=bucket)
        alice.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        version = alice.put_object(Bucket=bucket, Key="a", Body=b"old")["VersionId"]
        alice.put_object(Bucket=bucket, Key="a", Body=b"new")
        if not wall:
            monkeypatch.setattr(objectstore, "asks", as_object)
        monkeypatch.setattr(sys.modules[__name__], "DENIED", {denied})
        at = target.format(bucket=bucket, version=version)
        headers = {"x-amz-copy-source": source.format(bucket=bucket, version=version)} if source else {}
        status, _ = one.raw(method, at, sign(one, method, at, headers))
        assert (status == 403) is wall and status in (200, 204, 403)
        monkeypatch.setattr(sys.modules[__name__], "DENIED", set())
        left = [found["VersionId"] for found in alice.list_object_versions(Bucket=bucket, Prefix="a")["Versions"]]
        assert (version in left) is (wall or method != "DELETE")
    finally:
        one.close()


@pytest.mark.parametrize("query", ["?versionId=", "?versionId", "?versionId=1&versionId="])
def test_a_version_that_is_none_is_refused(kept: Rig, bucket: str, query: str) -> None:
    """It would be judged as one, and be the object."""
    at = f"/{bucket}/public{query}"
    status, said = kept.raw("DELETE", at, sign(kept, "DELETE", at, {}))
    assert status == 403 and b"InvalidArgument" in said and "public" in left(kept, bucket)


MULTIPART = '--x\r\nContent-Disposition: form-data; name="{}"\r\n\r\n{}\r\n--x--\r\n'


@pytest.mark.parametrize("wall", [True, False])
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("application/x-www-form-urlencoded", "versionId={}"), ("Application/X-WWW-Form-URLencoded ;x=y", "versionId={}"),
        ("application/x-www-form-urlencoded", "x=1&versionId={}"), ("multipart/form-data; boundary=x", MULTIPART.format("versionId", "{}")),
    ],
)  # fmt: skip
def test_a_body_is_no_query(bucket: str, kind: str, form: str, wall: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto reads a form as that: what was judged as the newest object's end would be that of an older one."""
    if not wall:
        monkeypatch.setattr(objectstore, "_FORM", NOTHING)
    one = Rig()
    try:
        alice = one.client("AKIAALICE")
        alice.create_bucket(Bucket=bucket)
        alice.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        version = alice.put_object(Bucket=bucket, Key="a", Body=b"old")["VersionId"]
        body = form.format(version).encode()
        one.raw("DELETE", f"/{bucket}/a", sign(one, "DELETE", f"/{bucket}/a", {"content-type": kind}, body), body)
        assert bool(alice.list_object_versions(Bucket=bucket).get("Versions")) is wall
    finally:
        one.close()


def test_an_object_that_comes_as_a_form_is_its_bytes(store: Rig, bucket: str) -> None:
    """As programs send it that set no type (urllib, curl --data)."""
    body, at = b"acl=1&key=x", f"/{bucket}/form"
    store.raw("PUT", at, sign(store, "PUT", at, {"content-type": "application/x-www-form-urlencoded"}, body), body)
    assert store.client("AKIAALICE").get_object(Bucket=bucket, Key="form")["Body"].read() == body


# ---- who says nothing ----

MOST = 8


def strangers(one: Rig, count: int) -> list[socket.socket]:
    """The head of each is on its way for ever."""
    found = []
    for _ in range(count):
        found.append(socket.create_connection(("127.0.0.1", one.port), timeout=30))
        found[-1].sendall(b"GET / HTTP/1.1\r\n")
    return found


def leave(guests: list[socket.socket]) -> None:
    for one in guests:
        one.close()


def threads(one: Rig) -> int:
    return sum(thread.name.endswith("(process_request_thread)") for thread in threading.enumerate())


@pytest.mark.parametrize("wall", [True, False])
def test_strangers_take_so_many_threads_and_the_oldest_makes_room(bucket: str, wall: bool) -> None:
    one = Rig(most=MOST if wall else 1000)
    crowd = strangers(one, 5 * MOST)
    try:
        one.client("AKIAALICE").create_bucket(Bucket=bucket)
        if wall:
            assert [sock.recv(1) for sock in crowd[: 4 * MOST]] == [b""] * 4 * MOST, "closed for those that came"
            until(lambda: len(one._server._visits) <= MOST + 1 and threads(one) <= 4 * MOST)  # they end after their connections
        else:
            assert len(one._server._visits) > 4 * MOST
            assert threads(one) > 4 * MOST
    finally:
        leave(crowd)
        one.close()


def test_who_shows_nothing_in_time_is_closed() -> None:
    """Also who is refused, and goes on sending."""
    one = Rig(head_seconds=0.1)
    crowd = strangers(one, 2)
    crowd[1].sendall(b"Content-Length: 9000000\r\n\r\n")
    try:
        assert crowd[0].recv(1) == b""
        with contextlib.suppress(ConnectionResetError):
            while crowd[1].recv(4096):
                pass
    finally:
        leave(crowd)
        one.close()


def test_a_call_under_way_makes_no_room(bucket: str) -> None:
    """Its signature was right, and its body is on its way; it has also taken longer than a head may."""
    one = Rig(most=MOST, head_seconds=0.5)
    one.client("AKIAALICE").create_bucket(Bucket=bucket)
    body = b"x" * 100
    fields = sign(one, "PUT", f"/{bucket}/a", {}, body)
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    crowd: list[socket.socket] = []
    with socket.create_connection(("127.0.0.1", one.port), timeout=30) as slow:
        slow.sendall(f"PUT /{bucket}/a HTTP/1.1\r\nContent-Length: 100\r\nExpect: 100-continue\r\n{head}\r\n".encode())
        try:
            assert slow.recv(4096).startswith(b"HTTP/1.1 100 ")
            until(lambda: one._server._connections._busy)  # it is said to another thread
            crowd += strangers(one, 3 * MOST)
            for sock in crowd[: 2 * MOST]:
                assert sock.recv(1) == b""
            slow.sendall(body)
            while (answer := slow.recv(4096)).startswith(b"HTTP/1.1 100 "):  # werkzeug and http.server say it each
                pass
            assert answer.startswith(b"HTTP/1.1 200 ")
        finally:
            leave(crowd)
            one.close()
