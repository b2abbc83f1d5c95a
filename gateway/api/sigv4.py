"""Checks AWS Signature Version 4, in the Authorization field or in the query (IAM User Guide: "Signing AWS API requests")."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from calendar import timegm
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote

from .errors import SignatureError

_ALGORITHM = "AWS4-HMAC-SHA256"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PARTS = {"Credential", "SignedHeaders", "Signature"}
_SCOPE = re.compile(r"([^/]+)/(\d{8})/([^/]+)/([^/]+)/aws4_request\Z")
SERVICES = ("lambda", "logs", "sts", "servicequotas")
_SECONDS = re.compile(r"[0-9]{1,7}")
_LONGEST_SECONDS = 604_800
_PLAIN = "-_.~"
BODY_HASH = "x-amz-content-sha256"
_MISMATCH = (
    "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key and "
    "signing method. Consult the service documentation for details."
)
_BAD_TOKEN = "The security token included in the request is invalid."


@dataclass(frozen=True)
class SignedRequest:
    """What is signed: `path` and `query` as they stood on the request line; field names in lower case; the body once it is there."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class Signature:
    """What a request says about its signature. `lives_seconds` is set in the query form only."""

    key: str
    day: str
    region: str
    service: str
    signed: tuple[str, ...]
    digest: str
    stamp: str
    token: str
    lives_seconds: int | None = None

    @property
    def scope(self) -> str:
        return f"{self.day}/{self.region}/{self.service}/aws4_request"


def parse(request: SignedRequest) -> Signature:
    """Raises SignatureError where there is no signature, or half of one."""
    authorization = request.headers.get("authorization", "")
    if authorization:
        parts = _authorization(authorization)
        stamp, token = request.headers.get("x-amz-date", ""), request.headers.get("x-amz-security-token", "")
        return Signature(*_scope(parts["Credential"]), tuple(parts["SignedHeaders"].split(";")), parts["Signature"], stamp, token)
    query = dict(parse_qsl(request.query, keep_blank_values=True))
    if "X-Amz-Signature" not in query and "X-Amz-Algorithm" not in query:
        raise SignatureError("MissingAuthenticationTokenException", "Missing Authentication Token")
    return _from_query(query)


def _authorization(text: str) -> dict[str, str]:
    """Returns the parts, which may come in any order, each once. Raises SignatureError."""
    algorithm, _, rest = text.strip().partition(" ")
    pairs = [part.strip().partition("=")[::2] for part in rest.split(",")]
    parts = dict(pairs)
    is_whole = parts.keys() == _PARTS and len(pairs) == len(parts) and _DIGEST.fullmatch(parts["Signature"])
    if algorithm != _ALGORITHM or not is_whole:
        raise SignatureError("IncompleteSignatureException", "The Authorization header is not a complete AWS4-HMAC-SHA256 signature.")
    return parts


def check_service(claimed: Signature, service: str) -> None:
    """A signature is for one service: a URL that was signed for somebody to ask STS who its signer is says nothing to the others. Raises
    SignatureError."""
    if claimed.service != service:
        raise SignatureError("InvalidSignatureException", f"Credential should be scoped to correct service: '{service}'.")


def _scope(credential: str) -> tuple[str, str, str, str]:
    scope = _SCOPE.match(credential)
    if scope is None:
        raise SignatureError(
            "IncompleteSignatureException", "Credential must have the form <key>/<YYYYMMDD>/<region>/<service>/aws4_request."
        )
    return scope[1], scope[2], scope[3], scope[4]


def _from_query(query: dict[str, str]) -> Signature:
    names = ("X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-SignedHeaders", "X-Amz-Signature", "X-Amz-Expires")
    missing = [name for name in names if not query.get(name)]
    if missing:
        raise SignatureError("IncompleteSignatureException", f"AWS query-string parameters must include {', '.join(missing)}.")
    lives = query["X-Amz-Expires"]
    if query["X-Amz-Algorithm"] != _ALGORITHM or not (_SECONDS.fullmatch(lives) and 0 < int(lives) <= _LONGEST_SECONDS):
        raise SignatureError(
            "IncompleteSignatureException", f"X-Amz-Algorithm must be {_ALGORITHM}, X-Amz-Expires 1 to {_LONGEST_SECONDS} seconds."
        )
    return Signature(
        *_scope(query["X-Amz-Credential"]), tuple(query["X-Amz-SignedHeaders"].split(";")), query["X-Amz-Signature"],
        query["X-Amz-Date"], query.get("X-Amz-Security-Token", ""), int(lives),
    )  # fmt: skip


def canonical_query(query: str) -> str:
    """Pairs encoded as RFC 3986 has it, sorted by name and then by value; the signature itself left out."""
    pairs = (pair.partition("=")[::2] for pair in query.split("&") if pair)
    encoded = sorted((_encoded(unquote(name)), _encoded(unquote(value))) for name, value in pairs)
    return "&".join(f"{name}={value}" for name, value in encoded if name != "X-Amz-Signature")


def _encoded(text: str, more: str = "") -> str:
    return quote(_raw(text), safe=_PLAIN + more)


def _raw(text: str) -> bytes:
    """Returns the bytes of what came as text, some of which may have been none (PEP 383)."""
    return text.encode("utf-8", "surrogateescape")


def canonical_path(path: str) -> str:
    """Dot segments and empty segments removed (RFC 3986, 5.2.4), then encoded: what was encoded is so twice."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    joined = "/" + "/".join(parts)
    if parts and path.endswith(("/", "/.", "/..")):
        joined += "/"
    return _encoded(joined, "/")


def canonical_request(request: SignedRequest, signed: tuple[str, ...], payload_hash: str, path: str = "") -> str:
    """`path`: as it is signed, where that is another one than the request's made canonical."""
    path = path or canonical_path(request.path)
    fields = "".join(f"{name}:{' '.join(request.headers.get(name, '').split())}\n" for name in signed)
    return "\n".join([request.method, path, canonical_query(request.query), fields, ";".join(signed), payload_hash])


def signing_key(secret: str, day: str, region: str, service: str) -> bytes:
    """Returns what signs for one service, in one region, on one day: its holder knows no more of the secret."""
    key = f"AWS4{secret}".encode()
    for part in (day, region, service, "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key


def digest(request: SignedRequest, claimed: Signature, secret: str, payload_hash: str) -> str:
    """Returns the signature that `secret` gives."""
    return signature(request, claimed, signing_key(secret, claimed.day, claimed.region, claimed.service), payload_hash)


def signature(request: SignedRequest, claimed: Signature, key: bytes, payload_hash: str, path: str = "") -> str:
    canonical = hashlib.sha256(_raw(canonical_request(request, claimed.signed, payload_hash, path))).hexdigest()
    return hmac.new(key, f"{_ALGORITHM}\n{claimed.stamp}\n{claimed.scope}\n{canonical}".encode(), hashlib.sha256).hexdigest()


def check_head(
    request: SignedRequest, claimed: Signature, secret: str | None, region: str, skew_seconds: int,
    clock: Callable[[], float] = time.time,
) -> None:  # fmt: skip
    """Everything that can be said before the body is there. Raises SignatureError. `secret` is None where the key is not known."""
    if secret is None:
        raise SignatureError("UnrecognizedClientException", _BAD_TOKEN)
    check_time(claimed, skew_seconds, clock())
    if claimed.region != region or claimed.service not in SERVICES:
        raise SignatureError(
            "InvalidSignatureException", f"Credential should be scoped to a valid region and service: {region}, {' or '.join(SERVICES)}."
        )
    check_signed(request, claimed)
    said = request.headers.get(BODY_HASH)
    if said is not None:
        _check_digest(request, claimed, secret, said)


def check_signed(request: SignedRequest, claimed: Signature) -> None:
    """What these fields say decides what is done. Raises SignatureError."""
    if "host" not in claimed.signed or list(claimed.signed) != sorted(claimed.signed):
        raise SignatureError("InvalidSignatureException", "'Host' must be a 'SignedHeader' in the AWS Authorization.")
    unsigned = sorted(name for name in request.headers if name.startswith("x-amz-") and name not in claimed.signed)
    if unsigned and unsigned != [BODY_HASH]:
        raise SignatureError("InvalidSignatureException", f"'{unsigned[0]}' must be a 'SignedHeader' in the AWS Authorization.")


def check_body(request: SignedRequest, claimed: Signature, secret: str) -> None:
    """The rest, of a request whose head was checked. Raises SignatureError. No operation here takes an unsigned payload, or one signed in
    chunks: no input of the model is a stream."""
    payload_hash = hashlib.sha256(request.body).hexdigest()
    said = request.headers.get(BODY_HASH)
    if said is None:
        _check_digest(request, claimed, secret, payload_hash)
    elif said != payload_hash:
        raise SignatureError("InvalidSignatureException", "The value of x-amz-content-sha256 is not the body's hash.")


def _check_digest(request: SignedRequest, claimed: Signature, secret: str, payload_hash: str) -> None:
    if not hmac.compare_digest(digest(request, claimed, secret, payload_hash).encode(), _raw(claimed.digest)):
        raise SignatureError("InvalidSignatureException", _MISMATCH)


def check_time(claimed: Signature, skew_seconds: int, now: float) -> None:
    stamp = claimed.stamp
    try:
        at = timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ"))
    except ValueError:
        raise SignatureError("IncompleteSignatureException", "X-Amz-Date is missing or not of the form YYYYMMDDTHHMMSSZ.") from None
    if not stamp.startswith(claimed.day):
        raise SignatureError("InvalidSignatureException", "Date in Credential scope does not match YYYYMMDD from X-Amz-Date.")
    lives = skew_seconds if claimed.lives_seconds is None else claimed.lives_seconds
    if at < now - lives:
        limit = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now - lives))
        raise SignatureError("InvalidSignatureException", f"Signature expired: {stamp} is now earlier than {limit}")
    if at > now + skew_seconds:
        limit = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now + skew_seconds))
        raise SignatureError("InvalidSignatureException", f"Signature not yet current: {stamp} is still later than {limit}")
