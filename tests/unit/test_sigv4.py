"""SigV4 against botocore's own signer."""

from __future__ import annotations

import hashlib
import json
from calendar import timegm
from time import strptime
from urllib.parse import urlsplit

import pytest
from botocore.auth import SigV4Auth, SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from gateway.api.errors import SignatureError
from gateway.api.sigv4 import Signature, SignedRequest, check_body, check_head, digest, parse

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
    check_head(request, claimed, KEYS.get(claimed.key), "us-east-1", 900, lambda: now)
    check_body(request, claimed, KEYS[claimed.key])
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


# ---- the published test suite (AWS: "Signature Version 4 test suite"): its requests and the signatures they must have ----

_PLAIN = "-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_TOKEN = (
    "AQoDYXdzEPT//////////wEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKWHGBuFqwAeMicRXmxfpSPfIeoIYRqTflfKD8YUuwthAx7mSEI/qkPpK"
    "Pi/kMcGdQrmGdeehM4IC1NtBmUpp2wUE8phUZampKsburEDy0KPkyQDYwT7WZ0wq5VSXDvp75YU9HFvlRd8Tx6q6fE8YQcHNVXAkiY9q6d+xo0rKwT38xVqr7ZD0u0"
    "iPPkUL64lIZbqBAz+scqKmlzm8FDrypNC9Yjc8fPOLn9FX9KSYvKTr4rvx3iSIlTJabIQwj2ICCR/oLxBA=="
)
_FORM = {"content-type": "application/x-www-form-urlencoded"}
_VANILLA = "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"


@pytest.mark.parametrize(
    ("name", "method", "path", "query", "fields", "body", "expected"),
    [
        ("get-vanilla", "GET", "/", "", {}, b"", _VANILLA),
        ("get-vanilla-query-order-key-case", "GET", "/", "Param2=value2&Param1=value1", {}, b"", "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500"),
        ("get-vanilla-empty-query-key", "GET", "/", "Param1=value1", {}, b"", "a67d582fa61cc504c4bae71f336f98b97f1ea3c7a6bfe1b6e45aec72011b9aeb"),
        ("get-vanilla-query-order-value", "GET", "/", "Param1=value2&Param1=value1", {}, b"", "5772eed61e12b33fae39ee5e7012498b51d56abc0abb7c60486157bd471c4694"),
        ("get-vanilla-query-unreserved", "GET", "/", f"{_PLAIN}={_PLAIN}", {}, b"", "9c3e54bfcdf0b19771a7f523ee5669cdf59bc7cc0884027167c21bb143a40197"),
        ("get-vanilla-utf8-query", "GET", "/", "\u1234=bar", {}, b"", "2cdec8eed098649ff3a119c94853b13c643bcf08f8b0a1d91e12c9027818dd04"),
        ("get-utf8", "GET", "/\u1234", "", {}, b"", "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85"),
        ("get-space", "GET", "/example space/", "", {}, b"", "652487583200325589f1fba4c7e578f72c47cb61beeca81406b39ddec1366741"),
        ("get-unreserved", "GET", f"/{_PLAIN}", "", {}, b"", "07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f"),
        ("get-relative", "GET", "/example/..", "", {}, b"", _VANILLA),
        ("get-relative-relative", "GET", "/example1/example2/../..", "", {}, b"", _VANILLA),
        ("get-slash", "GET", "//", "", {}, b"", _VANILLA),
        ("get-slash-dot-slash", "GET", "/./", "", {}, b"", _VANILLA),
        ("get-slash-pointless-dot", "GET", "/./example", "", {}, b"", "ef75d96142cf21edca26f06005da7988e4f8dc83a165a80865db7089db637ec5"),
        ("get-slashes", "GET", "//example//", "", {}, b"", "9a624bd73a37c9a373b5312afbebe7a714a789de108f0bdfe846570885f57e84"),
        ("get-header-key-duplicate", "GET", "/", "", {"my-header1": "value2,value2,value1"}, b"", "c9d5ea9f3f72853aea855b47ea873832890dbdd183b4468f858259531a5138ea"),
        ("get-header-value-order", "GET", "/", "", {"my-header1": "value4,value1,value3,value2"}, b"", "08c7e5a9acfcfeb3ab6b2185e75ce8b1deb5e634ec47601a50643f830c755c01"),
        ("get-header-value-multiline", "GET", "/", "", {"my-header1": "value1,value2,value3"}, b"", "ba17b383a53190154eb5fa66a1b836cc297cc0a3d70a5d00705980573d8ff790"),
        ("get-header-value-trim", "GET", "/", "", {"my-header1": " value1", "my-header2": ' "a   b   c"'}, b"", "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736"),
        ("post-vanilla", "POST", "/", "", {}, b"", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
        ("post-vanilla-query", "POST", "/", "Param1=value1", {}, b"", "28038455d6de14eafc1f9222cf5aa6f1a96197d7deb8263271d420d138af7f11"),
        ("post-header-key-sort", "POST", "/", "", {"my-header1": "value1"}, b"", "c5410059b04c1ee005303aed430f6e6645f61f4dc9e1461ec8f8916fdf18852c"),
        ("post-header-value-case", "POST", "/", "", {"my-header1": "VALUE1"}, b"", "cdbc9802e29d2942e5e10b5bccfdd67c5f22c7c4e8ae67b53629efa58b974b7d"),
        ("post-sts-header-before", "POST", "/", "", {"x-amz-security-token": _TOKEN}, b"", "85d96828115b5dc0cfc3bd16ad9e210dd772bbebba041836c64533a82be05ead"),
        ("post-x-www-form-urlencoded", "POST", "/", "", _FORM, b"Param1=value1", "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a"),
        ("post-x-www-form-urlencoded-parameters", "POST", "/", "", {"content-type": _FORM["content-type"] + "; charset=utf8"}, b"Param1=value1", "1a72ec8f64bd914b0e42e42607c7fbce7fb2c7465f63e3092b3b0d39fa77a6fe"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith(("get-", "post-")) else "",
)  # fmt: skip
def test_published_suite(name: str, method: str, path: str, query: str, fields: dict[str, str], body: bytes, expected: str) -> None:
    stamp = "20150830T123600Z"
    headers = {"host": "example.amazonaws.com", "x-amz-date": stamp, **fields}
    claimed = Signature("AKIDEXAMPLE", stamp[:8], "us-east-1", "service", tuple(sorted(headers)), "", stamp, "")
    request = SignedRequest(method, path, query, headers, body)
    assert digest(request, claimed, KEYS["AKIDEXAMPLE"], hashlib.sha256(body).hexdigest()) == expected


# ---- the query form ----


def presigned(seconds: int = 300, token: str | None = None, path: str = "/2025-09-09/microvms?maxResults=5") -> tuple[SignedRequest, float]:
    request = AWSRequest("GET", f"http://127.0.0.1:4700{path}")
    SigV4QueryAuth(Credentials("AKIDEXAMPLE", KEYS["AKIDEXAMPLE"], token), "lambda", "us-east-1", expires=seconds).add_auth(request)
    url = urlsplit(request.url)
    stamp = dict(pair.partition("=")[::2] for pair in url.query.split("&"))["X-Amz-Date"]
    return SignedRequest("GET", url.path, url.query, {"host": url.netloc}, b""), timegm(strptime(stamp, "%Y%m%dT%H%M%SZ"))


@pytest.mark.parametrize("token", [None, "a/token+with=signs"])
def test_presigned_requests(token: str | None) -> None:
    request, at = presigned(token=token)
    assert check(request, at + 299) == "AKIDEXAMPLE"
    assert parse(request).token == (token or "")
    assert refused(request, at + 301) == ("InvalidSignatureException", refused(request, at + 301)[1])
    assert "Signature expired" in refused(request, at + 301)[1]


def test_presigned_requests_are_whole() -> None:
    request, at = presigned()
    changed = SignedRequest("GET", request.path, request.query.replace("maxResults=5", "maxResults=6"), request.headers, b"")
    assert refused(changed, at)[0] == "InvalidSignatureException"
    for name in ("X-Amz-Credential", "X-Amz-Date", "X-Amz-SignedHeaders", "X-Amz-Expires"):
        less = "&".join(pair for pair in request.query.split("&") if not pair.startswith(name))
        assert refused(SignedRequest("GET", request.path, less, request.headers, b""), at)[0] == "IncompleteSignatureException"
    for lives in ("0", "604801", "x", "9%C2%B2"):
        query = request.query.replace("X-Amz-Expires=300", f"X-Amz-Expires={lives}")
        assert refused(SignedRequest("GET", request.path, query, request.headers, b""), at)[0] == "IncompleteSignatureException"


def test_unsigned_and_chunked_payloads_are_refused() -> None:
    for kind in ("UNSIGNED-PAYLOAD", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD", "STREAMING-UNSIGNED-PAYLOAD-TRAILER"):
        request, at = signed()
        fields = {**request.headers, "x-amz-content-sha256": kind}
        assert (
            refused(SignedRequest(request.method, request.path, request.query, fields, request.body), at)[0] == "InvalidSignatureException"
        )


def test_every_amz_field_must_be_signed() -> None:
    request, at = signed()
    fields = {**request.headers, "x-amz-security-token": "slipped in"}
    kind, text = refused(SignedRequest(request.method, request.path, request.query, fields, request.body), at)
    assert kind == "InvalidSignatureException" and "x-amz-security-token" in text


def test_bytes_that_are_no_text_are_signed_as_they_came() -> None:
    """As aiohttp gives them to us (PEP 383). They ended in a 500 and a traceback, for whoever sent them."""
    request, at = signed()
    for name, value in (("host", "\udcff"), ("content-type", "\udcc3\udca9")):
        changed = SignedRequest(request.method, request.path, request.query, {**request.headers, name: value}, request.body)
        assert refused(changed, at)[0] == "InvalidSignatureException"
    for path, query in (("/\udcff", ""), ("/", "a=\udcff"), ("/", "\udcff=%ff")):
        assert refused(SignedRequest(request.method, path, query, request.headers, request.body), at)[0] == "InvalidSignatureException"
    request, at = presigned()
    for signature in ("%C3%A9", "%ff", "\udcff"):
        query = request.query.rpartition("X-Amz-Signature=")[0] + f"X-Amz-Signature={signature}"
        assert refused(SignedRequest("GET", request.path, query, request.headers, b""), at)[0] == "InvalidSignatureException"
