"""Checks AWS Signature Version 4, header form (AWS General Reference: "Signing AWS API requests")."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from calendar import timegm
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import quote

from .errors import SignatureError

_ALGORITHM = "AWS4-HMAC-SHA256"
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256\s+Credential=([^/,\s]+)/(\d{8})/([^/,\s]+)/([^/,\s]+)/aws4_request\s*,\s*"
    r"SignedHeaders=([^,\s]+)\s*,\s*Signature=([0-9a-f]{64})\s*\Z"
)
_UNSIGNED = "UNSIGNED-PAYLOAD"
_SERVICES = ("lambda", "logs")
_MISMATCH = (
    "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key and "
    "signing method. Consult the service documentation for details."
)


@dataclass(frozen=True)
class SignedRequest:
    """What is signed: `path` and `query` as they stood on the request line; field names in lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def canonical_query(query: str) -> str:
    pairs = sorted(pair.partition("=")[::2] for pair in query.split("&") if pair)
    return "&".join(f"{name}={value}" for name, value in pairs)


def _canonical(request: SignedRequest, signed: list[str], payload_hash: str) -> str:
    fields = "".join(f"{name}:{' '.join(request.headers.get(name, '').split())}\n" for name in signed)
    return "\n".join(
        [request.method, quote(request.path, safe="/~"), canonical_query(request.query), fields, ";".join(signed), payload_hash]
    )


def verify(
    request: SignedRequest, secrets: Mapping[str, str], region: str, skew_seconds: int, clock: Callable[[], float] = time.time
) -> str:
    """The access key that signed. Raises SignatureError."""
    authorization = request.headers.get("authorization", "")
    if not authorization:
        raise SignatureError("MissingAuthenticationTokenException", "Missing Authentication Token")
    match = _AUTHORIZATION.match(authorization)
    if match is None:
        raise SignatureError("IncompleteSignatureException", "The Authorization header is not a complete AWS4-HMAC-SHA256 signature.")
    key, day, scope_region, service, signed_list, signature = match.groups()
    signed = signed_list.split(";")
    secret = secrets.get(key)
    if secret is None:
        raise SignatureError("UnrecognizedClientException", "The security token included in the request is invalid.")
    stamp = request.headers.get("x-amz-date", "")
    _check_time(stamp, day, skew_seconds, clock())
    if scope_region != region or service not in _SERVICES:
        raise SignatureError(
            "InvalidSignatureException", f"Credential should be scoped to a valid region and service: {region}, {' or '.join(_SERVICES)}."
        )
    if "host" not in signed or signed != sorted(signed):
        raise SignatureError("InvalidSignatureException", "'Host' must be a 'SignedHeader' in the AWS Authorization.")
    body_hash = hashlib.sha256(request.body).hexdigest()
    declared = request.headers.get("x-amz-content-sha256", body_hash)
    if declared not in (body_hash, _UNSIGNED):
        raise SignatureError("InvalidSignatureException", "The value of x-amz-content-sha256 is not the body's hash.")
    signing = _hmac(_hmac(_hmac(_hmac(f"AWS4{secret}".encode(), day), scope_region), service), "aws4_request")
    canonical = hashlib.sha256(_canonical(request, signed, declared).encode()).hexdigest()
    expected = _hmac(signing, f"{_ALGORITHM}\n{stamp}\n{day}/{scope_region}/{service}/aws4_request\n{canonical}").hex()
    if not hmac.compare_digest(expected, signature):
        raise SignatureError("InvalidSignatureException", _MISMATCH)
    return key


def _check_time(stamp: str, day: str, skew_seconds: int, now: float) -> None:
    try:
        at = timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ"))
    except ValueError:
        raise SignatureError("IncompleteSignatureException", "X-Amz-Date is missing or not of the form YYYYMMDDTHHMMSSZ.") from None
    if not stamp.startswith(day):
        raise SignatureError("InvalidSignatureException", "Date in Credential scope does not match YYYYMMDD from X-Amz-Date.")
    limit = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now - skew_seconds if at < now else now + skew_seconds))
    if at < now - skew_seconds:
        raise SignatureError("InvalidSignatureException", f"Signature expired: {stamp} is now earlier than {limit}")
    if at > now + skew_seconds:
        raise SignatureError("InvalidSignatureException", f"Signature not yet current: {stamp} is still later than {limit}")
