"""What a guest may ask of its host: metadata's rules, credentials that are made again in time, names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from api_rig import ACCOUNT, KEY, SECRET, ApiRig
from hypothesis import given
from hypothesis import strategies as st

from gateway.accounts.directory import Credentials as Made
from gateway.config import Credentials
from gateway.guest.credentials import Issuer
from gateway.guest.metadata import Metadata
from gateway.guest.resolver import host_resolvers, refused

ROLE = f"arn:aws:iam::{ACCOUNT}:role/worker"
CREDENTIALS = "/latest/meta-data/iam/security-credentials/"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


async def issue() -> Made:
    return Made("ASIAX", "secret", "token", 1_003_300.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metadata(clock: Clock) -> Metadata:
    return Metadata("us-east-1", issue, clock)


async def token(metadata: Metadata, seconds: str = "60") -> str:
    status, _, text = await metadata.answer("PUT", "/latest/api/token", {"x-aws-ec2-metadata-token-ttl-seconds": seconds})
    assert status == 200
    return text


async def test_credentials(metadata: Metadata) -> None:
    fields = {"x-aws-ec2-metadata-token": await token(metadata)}
    assert await metadata.answer("GET", CREDENTIALS, fields) == (200, "text/plain", "execution_role")
    status, kind, text = await metadata.answer("GET", f"{CREDENTIALS}execution_role", fields)
    made = json.loads(text)
    assert (status, kind, made["AccessKeyId"], made["Expiration"]) == (200, "application/json", "ASIAX", "1970-01-12T14:41:40Z")
    assert (await metadata.answer("GET", "/latest/meta-data/placement/region", fields))[2] == "us-east-1"


@pytest.mark.parametrize(
    ("method", "path", "fields", "status"),
    [
        ("GET", CREDENTIALS, {}, 401),
        ("GET", CREDENTIALS, {"x-aws-ec2-metadata-token": "made up"}, 401),
        ("PUT", "/latest/api/token", {}, 400),
        ("PUT", "/latest/api/token", {"x-aws-ec2-metadata-token-ttl-seconds": "0"}, 400),
        ("PUT", "/latest/api/token", {"x-aws-ec2-metadata-token-ttl-seconds": "21601"}, 400),
        ("PUT", "/latest/api/token", {"x-aws-ec2-metadata-token-ttl-seconds": "60", "x-forwarded-for": "1.2.3.4"}, 403),
        ("GET", "/latest/api/token", {}, 405),
        ("POST", CREDENTIALS, {}, 405),
    ],
)
async def test_refusals(metadata: Metadata, method: str, path: str, fields: dict[str, str], status: int) -> None:
    assert (await metadata.answer(method, path, fields))[0] == status


async def test_tokens_end(metadata: Metadata, clock: Clock) -> None:
    fields = {"x-aws-ec2-metadata-token": await token(metadata, "60")}
    clock.now += 59
    assert (await metadata.answer("GET", CREDENTIALS, fields))[0] == 200
    clock.now += 1
    assert (await metadata.answer("GET", CREDENTIALS, fields))[0] == 401


async def test_tokens_are_bounded(metadata: Metadata) -> None:
    first = await token(metadata)
    for _ in range(64):
        last = await token(metadata)
    assert (await metadata.answer("GET", CREDENTIALS, {"x-aws-ec2-metadata-token": first}))[0] == 401
    assert (await metadata.answer("GET", CREDENTIALS, {"x-aws-ec2-metadata-token": last}))[0] == 200


async def test_no_role(clock: Clock) -> None:
    without = Metadata("us-east-1", None, clock)
    fields = {"x-aws-ec2-metadata-token": await token(without)}
    for tail in ("", "execution_role"):
        assert (await without.answer("GET", CREDENTIALS + tail, fields))[0] == 404


async def test_credentials_are_made_again_before_they_end(clock: Clock) -> None:
    made: list[str] = []

    class Directory:
        def issue(self, role: str, name: str) -> Made:
            made.append(role)
            return Made(f"ASIA{len(made)}", "s", "t", clock.now + 3300)

    kept = Issuer(Credentials(), "us-east-1", Directory(), clock).of(ROLE, "microvm-1")  # type: ignore[arg-type]
    assert (await kept()).access_key == (await kept()).access_key == "ASIA1"
    clock.now += 2000  # 1,300 seconds left
    assert (await kept()).access_key == "ASIA1"
    clock.now += 200
    assert (await kept()).access_key == "ASIA2"
    clock.now += 100_000  # after a long sleep
    assert (await kept()).access_key == "ASIA3"


def test_credentials_from_a_real_sts(tmp_path: Path) -> None:
    api = ApiRig(tmp_path)
    try:
        settings = Credentials(sts_endpoint=f"http://127.0.0.1:{api.port}", access_key=KEY, secret_key=SECRET)
        made = Issuer(settings, "us-east-1", api.accounts)._assume(ROLE, "microvm-1")
        client: Any = api.client("sts", (made.access_key, made.secret, made.token))
        assert client.get_caller_identity()["Arn"] == f"arn:aws:sts::{ACCOUNT}:assumed-role/worker/microvm-1"
    finally:
        api.close()


@given(st.binary(min_size=12, max_size=60))
def test_a_refusal_answers_its_question(question: bytes) -> None:
    answer = refused(question)
    assert answer[:2] == question[:2] and answer[2] & 0x80 and answer[3] & 0x0F == 5
    assert answer[4:6] == question[4:6] and answer[12:] == question[12:]


def test_the_hosts_resolvers(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("# no\nsearch example.com\nnameserver 10.0.0.1\nnameserver fe80::1\noptions rotate\n")
    assert host_resolvers(path) == ["10.0.0.1", "fe80::1"]
    assert host_resolvers(tmp_path / "none") == []
