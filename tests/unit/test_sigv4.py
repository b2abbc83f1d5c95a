"""SigV4 against botocore's own signer."""

from __future__ import annotations

import json
from calendar import timegm
from time import strptime
from urllib.parse import urlsplit

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from gateway.api.errors import SignatureError
from gateway.api.sigv4 import SignedRequest, parse, verify

KEYS = {"AKIDEXAMPLE": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"}
ARN = "arn:aws:lambda:us-east-1:123456789012:microvm-image:a b/ü"


def signed(
    method: str = "POST", path: str = "/2025-09-09/microvms", body: bytes = b'{"a": 1}', secret: str = KEYS["AKIDEXAMPLE"],
    region: str = "us-east-1", service: str = "lambda", key: str = "AKIDEXAMPLE", token: str | None = None,
) -> tuple[SignedRequest, float]:  # fmt: skip
    """The request, and the time at which it was signed."""
    request = AWSRequest(method, f"http://127.0.0.1:4700{path}", data=body, headers={"Content-Type": "application/json"})
    SigV4Auth(Credentials(key, secret, token), service, region).add_auth(request)
    prepared = request.prepare()
    url = urlsplit(prepared.url)
    headers = {name.lower(): value for name, value in prepared.headers.items()} | {"host": url.netloc}
    at = timegm(strptime(headers["x-amz-date"], "%Y%m%dT%H%M%SZ"))
    return SignedRequest(method, url.path, url.query, headers, body), at


def check(request: SignedRequest, now: float) -> str:
    claimed = parse(request)
    verify(request, claimed, KEYS.get(claimed.key), "us-east-1", 900, lambda: now)
    return claimed.key


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/2025-09-09/microvms?maxResults=5&nextToken=a%3D%3D",
        "/x?b=2&a=1&a=0&c",
        "/a%20b/%C3%BC",
        "/2025-09-09/images/arn%3Aaws%3Alambda",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_good_signatures(method: str, path: str) -> None:
    request, at = signed(method, path, b"" if method == "GET" else json.dumps({"arn": ARN}).encode())
    assert check(request, at) == "AKIDEXAMPLE"


def test_session_tokens_are_signed_too() -> None:
    request, at = signed(token="session")
    assert check(request, at) == "AKIDEXAMPLE"


def refused(request: SignedRequest, now: float) -> tuple[str, str]:
    with pytest.raises(SignatureError) as error:
        check(request, now)
    return error.value.kind, str(error.value)


def test_wrong_key_secret_region_service() -> None:
    assert refused(*signed(key="AKIDOTHER"))[0] == "UnrecognizedClientException"
    assert refused(*signed(secret="wrong"))[0] == "InvalidSignatureException"
    assert refused(*signed(region="eu-west-1"))[0] == "InvalidSignatureException"
    assert refused(*signed(service="s3"))[0] == "InvalidSignatureException"


@pytest.mark.parametrize("field", ["method", "path", "query", "body", "header"])
def test_anything_changed_is_refused(field: str) -> None:
    request, at = signed(path="/a?b=c")
    changed = {
        "method": SignedRequest("PUT", request.path, request.query, request.headers, request.body),
        "path": SignedRequest(request.method, "/b", request.query, request.headers, request.body),
        "query": SignedRequest(request.method, request.path, "b=d", request.headers, request.body),
        "body": SignedRequest(request.method, request.path, request.query, request.headers, b'{"a": 2}'),
        "header": SignedRequest(request.method, request.path, request.query, {**request.headers, "host": "evil"}, request.body),
    }[field]
    assert refused(changed, at)[0] == "InvalidSignatureException"


@pytest.mark.parametrize(("skew", "text"), [(901, "Signature expired"), (-901, "Signature not yet current")])
def test_skewed_clocks(skew: int, text: str) -> None:
    request, at = signed()
    assert check(request, at + skew - (1 if skew > 0 else -1)) == "AKIDEXAMPLE"
    kind, message = refused(request, at + skew)
    assert kind == "InvalidSignatureException" and message.startswith(text)


@pytest.mark.parametrize(
    ("authorization", "kind"),
    [
        ("", "MissingAuthenticationTokenException"),
        ("Bearer x", "IncompleteSignatureException"),
        ("AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE", "IncompleteSignatureException"),
    ],
)
def test_broken_authorization(authorization: str, kind: str) -> None:
    request, at = signed()
    broken = SignedRequest(request.method, request.path, request.query, {**request.headers, "authorization": authorization}, request.body)
    assert refused(broken, at)[0] == kind


def test_host_must_be_signed() -> None:
    request, at = signed()
    fields = dict(request.headers)
    fields["authorization"] = fields["authorization"].replace("content-type;host;", "content-type;")
    assert refused(SignedRequest(request.method, request.path, request.query, fields, request.body), at)[0] == "InvalidSignatureException"
