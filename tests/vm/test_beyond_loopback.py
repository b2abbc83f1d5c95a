"""A service that other hosts reach: API and metrics by TLS; two accounts and the embedded store; tokens' key; who may not start so."""

from __future__ import annotations

import json
import socket
import ssl
import stat
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from service import BIN, Instance

pytestmark = pytest.mark.service
TOKEN = "a-token-of-24-characters"


@pytest.fixture(scope="module")
def one() -> Iterator[Instance]:
    made = Instance("beyond", 9_500_000, EDGE__WORKERS="1", SERVICE__STOP_SECONDS="30", API__TLS="true", API__ADDRESS="0.0.0.0")
    (token := made.directory / "token").write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    made.environment |= {"TORPOR_API__METRICS_ADDRESS": "0.0.0.0", "TORPOR_API__METRICS_TOKEN_FILE": str(token)}
    try:
        made.start()
        yield made
        assert made.stop() == 0
    finally:
        log = made.log.read_text()
        made.remove()
    assert "Traceback" not in log, log


def port(one: Instance, name: str) -> int:
    return int(one.environment[f"TORPOR_{name}"])


def test_aws_finds_its_way_with_the_profile(one: Instance) -> None:
    assert json.loads(one.command("aws", "lambda-microvms", "list-microvms").stdout) == {"items": []}
    assert "https://localhost:" in (one.root / "aws/config").read_text()


def test_nothing_is_said_in_the_clear(one: Instance) -> None:
    for name in ("API__PORT", "API__METRICS_PORT"):
        with socket.create_connection(("127.0.0.1", port(one, name)), 10) as sock:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            sock.settimeout(20)
            assert not sock.recv(100).startswith(b"HTTP")


def test_metrics_want_the_token(one: Instance) -> None:
    trusts = ssl.create_default_context(cafile=str(one.root / "tls/ca.crt"))

    def get(path: str, token: str = "") -> tuple[int, str]:
        request = urllib.request.Request(f"https://localhost:{port(one, 'API__METRICS_PORT')}{path}")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, context=trusts, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    assert get("/metrics")[0] == get("/metrics", "another")[0] == 401
    assert "torpor_sessions" in get("/metrics", TOKEN)[1]
    assert get("/healthz") == (200, '{"ok": true}\n')


def test_keys_are_controls_alone(one: Instance) -> None:
    control = one.first_uid + 1
    for path in (one.root / "tls/api.key", one.root / "control/metrics.token", one.root / "control/torpor.db"):
        status = path.stat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (control, 0o600), path


def s3(one: Instance, key: str, secret: str) -> Any:
    return boto3.client(
        "s3", region_name="us-east-1", endpoint_url=f"http://127.0.0.1:{port(one, 'OBJECT_STORE__PORT')}", aws_access_key_id=key,
        aws_secret_access_key=secret, config=Config(s3={"addressing_style": "path"}),
    )  # fmt: skip


def test_each_account_has_its_own_buckets(one: Instance) -> None:
    """A second account's key is one to the store as soon as there is one, and its owner sees nothing of the first account's."""
    first = s3(one, *next(iter(json.loads((one.root / "control/access-keys.json").read_text()).items())))
    first.create_bucket(Bucket="firsts")
    first.put_object(Bucket="firsts", Key="app.zip", Body=b"source")
    number = one.command("torpor", "account", "create", "other").stdout.strip()
    made = json.loads(one.command("torpor", "key", "create", "ann", "--account", number, "--admin", "--json").stdout)
    none = json.loads(one.command("torpor", "key", "create", "bob", "--account", number, "--json").stdout)
    other = s3(one, made["key"], made["secret"])
    other.create_bucket(Bucket="others")
    assert [bucket["Name"] for bucket in other.list_buckets()["Buckets"]] == ["others"]
    with pytest.raises(ClientError, match="AccessDenied"):
        other.get_object(Bucket="firsts", Key="app.zip")
    assert first.get_object(Bucket="firsts", Key="app.zip")["Body"].read() == b"source"
    with pytest.raises(ClientError, match="AccessDenied"):
        s3(one, none["key"], none["secret"]).list_buckets()
    with pytest.raises(ClientError, match="InvalidAccessKeyId"):
        s3(one, "AKIANOBODY", "x").list_buckets()


def test_tokens_are_taken_back_and_their_key_changed(one: Instance) -> None:
    def kids() -> list[str]:
        stored = json.loads((one.root / "control/keys.json").read_text())
        return [key["kid"] for key in (stored if isinstance(stored, list) else stored["keys"])]

    before = kids()
    one.command("torpor", "tokens", "rotate")
    assert kids()[:-1] == before
    assert "are refused" in one.command("torpor", "tokens", "revoke").stdout
    assert json.loads((one.root / "control/keys.json").read_text())["revoked"]["before"] > 0
    unknown = one.command("torpor", "tokens", "revoke", f"microvm-{'0' * 8}-0000-0000-0000-{'0' * 12}", check=False)
    assert unknown.returncode == 1 and "MicroVM not found" in unknown.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"TORPOR_API__TLS": "false"}, "api.address 0.0.0.0 is beyond loopback"), ({"TORPOR_API__METRICS_TOKEN_FILE": ""}, "api.metrics_token_file"),
        ({"TORPOR_API__METRICS_TOKEN_FILE": "/etc/hostname"}, "may be read by others"),
    ],
)  # fmt: skip
def test_a_service_does_not_start_so(one: Instance, settings: dict[str, str], said: str) -> None:
    """In one line."""
    root = one.directory / "refused"
    environment = one.environment | settings | {"TORPOR_NAME": "refused", "TORPOR_ROOT": str(root), "TORPOR_USERS__FIRST": "9700000"}
    for name in ("API__PORT", "API__METRICS_PORT", "OBJECT_STORE__PORT", "EDGE__PORT"):
        environment[f"TORPOR_{name}"] = "0"
    done = subprocess.run([BIN / "torpor", "serve"], env=environment, capture_output=True, text=True, timeout=120, check=False, cwd="/")
    lines = [line for line in done.stderr.splitlines() if said in line]
    assert done.returncode in (1, 2) and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
