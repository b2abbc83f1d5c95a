"""The wall around a signature: it is for one service, and nothing that was not signed decides what is done.

Taken away by name: `check_service`, and the refusal of fields that were not signed (gateway/api/sigv4.py).
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from api_rig import KEY, REGION, SECRET, ApiRig
from botocore.auth import SigV4Auth, SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from gateway.api import sigv4
from gateway.api.errors import SignatureError

DESCRIBE = "Logs_20140328.DescribeLogGroups"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiRig]:
    one = ApiRig(tmp_path)
    one.logs.append("123456789012", "/aws/lambda-microvms/app", "s", ["a line"])
    yield one
    one.close()


def presigned(api: ApiRig) -> str:
    """What Vault's and EKS's logins pass around: it says who its signer is, to whoever has it."""
    request = AWSRequest("POST", f"http://127.0.0.1:{api.port}/?Action=GetCallerIdentity&Version=2011-06-15", data=b"")
    SigV4QueryAuth(Credentials(KEY, SECRET), "sts", REGION, 300).add_auth(request)
    return request.prepare().url


def sent(api: ApiRig, url: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=30)
    try:
        connection.request("POST", f"{parts.path}?{parts.query}", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("taken_away", "opens"), [((), False), (("service",), False), (("unsigned",), False), (("service", "unsigned"), True)]
)
def test_a_signed_question_to_sts_lists_no_logs(
    api: ApiRig, monkeypatch: pytest.MonkeyPatch, taken_away: tuple[str, ...], opens: bool
) -> None:
    """Two layers, each enough: the scope's service, and a target that was not signed. Without both the signer's log groups are listed."""
    if "service" in taken_away:
        monkeypatch.setattr(sigv4, "check_service", lambda claimed, service: None)
    if "unsigned" in taken_away:
        monkeypatch.setattr(sigv4, "check_signed", lambda request, claimed: None)
    status, said = sent(api, presigned(api), b"", {"X-Amz-Target": DESCRIBE, "Content-Type": "application/x-amz-json-1.1"})
    assert (status == 200 and "/aws/lambda-microvms/app" in said) is opens, said


@pytest.mark.parametrize("service", ["sts", "lambda", "servicequotas", "s3"])
def test_a_signature_for_another_service_is_none(api: ApiRig, service: str) -> None:
    for target, path in ((DESCRIBE, "/"), ("", "/2025-09-09/microvms")):
        request = AWSRequest("POST" if target else "GET", f"http://127.0.0.1:{api.port}{path}", data=b"{}" if target else b"")
        if target:
            request.headers["X-Amz-Target"] = target
        SigV4Auth(Credentials(KEY, SECRET), service, REGION).add_auth(request)
        connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=30)
        connection.request(request.method, path, request.data, dict(request.prepare().headers))
        answer = connection.getresponse()
        said = json.loads(answer.read())
        connection.close()
        if service == "lambda" and not target:
            assert answer.status == 200
        else:
            assert answer.status == 403 and "service" in said["message"], said


def test_clients_of_each_service_are_served(api: ApiRig) -> None:
    """The control of all of this: who signs for the service that he asks is answered."""
    assert api.client("sts").get_caller_identity()["Account"] == "123456789012"
    assert [one["logGroupName"] for one in api.client("logs").describe_log_groups()["logGroups"]] == ["/aws/lambda-microvms/app"]
    assert api.client("lambda-microvms").list_microvms()["items"] == []
    assert api.client("lambda-core").list_network_connectors()["NetworkConnectors"] == []
    assert api.client("service-quotas").list_service_quotas(ServiceCode="lambda")["Quotas"]


def authorization(*parts: str) -> str:
    return "AWS4-HMAC-SHA256 " + ", ".join(parts)


CREDENTIAL, NAMES, SIGNATURE = "Credential=AKID/20260101/us-east-1/lambda/aws4_request", "SignedHeaders=host", f"Signature={'0' * 64}"


def claimed(text: str) -> sigv4.Signature:
    return sigv4.parse(sigv4.SignedRequest("GET", "/", "", {"authorization": text, "host": "h"}))


def test_parts_of_a_signature_come_in_any_order_and_once() -> None:
    expected = claimed(authorization(CREDENTIAL, NAMES, SIGNATURE))
    assert claimed(authorization(SIGNATURE, CREDENTIAL, NAMES)) == expected == claimed(authorization(NAMES, SIGNATURE, CREDENTIAL))
    for text in (
        authorization(CREDENTIAL, NAMES), authorization(CREDENTIAL, CREDENTIAL, NAMES, SIGNATURE), authorization(CREDENTIAL, NAMES, SIGNATURE, "Other=1"),
        authorization(CREDENTIAL, NAMES, "Signature=x"), "AWS4-HMAC-SHA512 " + CREDENTIAL, authorization(CREDENTIAL, NAMES, SIGNATURE, ""),
    ):  # fmt: skip
        with pytest.raises(SignatureError):
            claimed(text)


def test_a_value_is_signed_with_its_commas_as_they_are(api: ApiRig) -> None:
    """botocore signs `a, b` as it is; it was taken for `a,b`, and refused."""
    status, _, said = api.raw("GET", "/2025-09-09/microvms", headers={"X-Custom": "a, b  ,c"})
    assert status == 200, said
