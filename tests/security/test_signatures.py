"""The wall around a signature: it is for one service, and nothing that was not signed decides what is done.

Taken away by name: `check_service`, and the refusal of fields that were not signed (gateway/api/sigv4.py).
"""

from __future__ import annotations

import http.client
import json
import socket
import time
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


# ---- what is signed is what is done: forms, lists, times ----


def asked(api: ApiRig, method: str, target: str, headers: dict[str, str], body: bytes = b"") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=30)
    try:
        connection.putrequest(method, target, skip_host="host" in {name.lower() for name in headers}, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def signed(api: ApiRig, method: str = "GET", path: str = "/2025-09-09/microvms", body: bytes = b"", **headers: str) -> dict[str, str]:
    request = AWSRequest(method, f"http://127.0.0.1:{api.port}{path}", data=body, headers=headers)
    SigV4Auth(Credentials(KEY, SECRET), "lambda", REGION).add_auth(request)
    return dict(request.headers)


def query_form(
    api: ApiRig, path: str = "/2025-09-09/microvms?maxResults=5", seconds: int = 300, token: str | None = None, **headers: str
) -> str:
    request = AWSRequest("GET", f"http://127.0.0.1:{api.port}{path}", headers=headers)
    SigV4QueryAuth(Credentials(KEY, SECRET, token), "lambda", REGION, seconds).add_auth(request)
    return str(request.prepare().url).partition(f":{api.port}")[2]


def test_a_presigned_request_is_that_request_alone(api: ApiRig) -> None:
    target = query_form(api)
    assert asked(api, "GET", target, {})[0] == 200, "the control"
    for method, changed, headers in (
        ("POST", target, {}), ("GET", target.replace("microvms?", "microvm-images?"), {}), ("GET", target.replace("maxResults=5", "maxResults=6"), {}),
        ("GET", f"{target}&nextToken=x", {}), ("GET", target.replace("X-Amz-Expires=300", "X-Amz-Expires=600"), {}),
        ("GET", target.replace("%2Flambda%2F", "%2Flogs%2F"), {}), ("GET", target.replace("us-east-1", "eu-west-1"), {}),
        ("GET", target, {"Host": "elsewhere"}), ("GET", target, {"X-Amz-Target": DESCRIBE}), ("GET", target, {"X-Amz-Security-Token": "t"}),
        ("GET", f"{target}&X-Amz-Security-Token=t", {}),
    ):  # fmt: skip
        assert asked(api, method, changed, headers)[0] == 403, (method, changed, headers)


def test_the_order_of_a_query_and_its_spelling_say_nothing(api: ApiRig) -> None:
    path, _, query = query_form(api).partition("?")
    assert asked(api, "GET", f"{path}?{'&'.join(reversed(query.split('&')))}", {})[0] == 200
    assert asked(api, "GET", f"{path}?{query.replace('maxResults=5', 'max%52esults=%35')}", {})[0] == 200


def test_fields_that_a_presigned_request_signs_have_to_come_with_it(api: ApiRig) -> None:
    target = query_form(api, **{"X-Amz-Meta": "a"})
    assert asked(api, "GET", target, {"X-Amz-Meta": "a"})[0] == 200
    assert asked(api, "GET", target, {})[0] == asked(api, "GET", target, {"X-Amz-Meta": "b"})[0] == 403


@pytest.mark.parametrize("seconds", [0, 604_801])
def test_a_presigned_request_lives_for_a_week_at_most(api: ApiRig, seconds: int) -> None:
    status, said = asked(api, "GET", query_form(api, seconds=seconds), {})
    assert status == 403 and "IncompleteSignatureException" not in said and "X-Amz-Expires 1 to 604800" in said


def test_a_list_of_signed_fields_is_exact(api: ApiRig) -> None:
    """Names in lower case, sorted, with host among them: another list is another signature, or none."""
    headers = signed(api, Custom="a")
    assert asked(api, "GET", "/2025-09-09/microvms", headers)[0] == 200, "the control"
    listed = headers["Authorization"].partition("SignedHeaders=")[2].partition(",")[0]
    assert listed == "custom;host;x-amz-date"
    for other in (
        "host;custom;x-amz-date",
        "custom;x-amz-date",
        "Custom;Host;X-Amz-Date",
        "custom;host",
        "custom;host;host;x-amz-date",
        "",
        "custom;host;x-amz-date;x-more",
    ):
        changed = headers | {"Authorization": headers["Authorization"].replace(listed, other)}
        assert asked(api, "GET", "/2025-09-09/microvms", changed)[0] == 403, other
    assert asked(api, "GET", "/2025-09-09/microvms", headers | {"Custom": "b"})[0] == 403
    assert asked(api, "GET", "/2025-09-09/microvms", headers | {"Other": "b"})[0] == 200, (
        "what is not signed and decides nothing may be added, as by a proxy"
    )


def test_a_field_that_comes_twice_is_signed_as_both(api: ApiRig) -> None:
    """Of two values the first was signed: a server that took the last one would do what nobody has signed."""
    headers = signed(api, Custom="a")
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    host = f"Host: 127.0.0.1:{api.port}\r\n"
    for more, status in (("", b"200"), ("Custom: b\r\n", b"403")):
        with socket.create_connection(("127.0.0.1", api.port), 30) as sock:
            sock.sendall(f"GET /2025-09-09/microvms HTTP/1.1\r\n{host}{lines}{more}\r\n".encode())
            assert sock.recv(64).split(b" ")[1] == status


def test_a_request_is_good_again_for_its_fifteen_minutes_and_as_it_was(api: ApiRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As AWS has it: a signature is no nonce. With another body it is none, and after its time neither; clientToken is what makes a deed one."""
    body = b'{"name": "x"}'
    headers = signed(api, "POST", "/2025-09-09/microvms", body)
    first = asked(api, "POST", "/2025-09-09/microvms", headers, body)
    assert first[0] == 400 and "ValidationException" not in first[1] and "imageIdentifier" in first[1]
    assert asked(api, "POST", "/2025-09-09/microvms", headers, body) == first, "refused for what it says, and not for coming twice"
    assert asked(api, "POST", "/2025-09-09/microvms", headers, body.replace(b"x", b"y"))[0] == 403
    later = time.time()
    for seconds, status in ((890, 400), (910, 403), (-890, 400), (-910, 403)):
        monkeypatch.setattr(sigv4.check_head, "__defaults__", (lambda seconds=seconds: later + seconds,))
        assert asked(api, "POST", "/2025-09-09/microvms", headers, body)[0] == status, seconds
