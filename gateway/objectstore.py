"""The embedded object store for demos and tests: moto's S3 server on an inherited socket. Its objects live in memory.

Every request is signed with a key that control knows, and may do what its user's policy allows (`asks`); and a bucket belongs to the
account that made it: others may neither read nor write there, whatever they call it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hmac
import logging
import os
import re
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import parse_qsl, quote, unquote, urlparse
from xml.sax.saxutils import escape

from werkzeug.serving import WSGIRequestHandler

from . import messages as m
from . import own_walls, process, storebody, storechunks
from .api import sigv4
from .api.connections import Connections
from .api.errors import SignatureError
from .rpc import Client, RpcError
from .storeconnections import BoundedServer

Find = Callable[[m.StoreKeyRequest], m.StoreKey | None]
Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
SKEW_SECONDS = 900
_ASK_SECONDS = 10.0
_KNOWN_SECONDS, _KNOWN = 30.0, 1024  # how long a key that was taken back is still good for, and how many are remembered
_SILENT_SECONDS = 60
_CONNECTIONS = 256  # at once, with a thread each
_STACK_BYTES = 1 << 20  # of each, which counts as memory that the process has, used or not
_UNSIGNED: Final = "UNSIGNED-PAYLOAD"
_OTHER_POSTS: Final = {"uploads", "uploadId", "restore"}  # which moto looks for before `select`
_BUCKET = re.compile(r"[A-Za-z0-9._-]*")  # moto ends it at a semicolon
_FORM = re.compile(r"form-data|url-?encoded", re.IGNORECASE)  # of content types (werkzeug.formparser)
_SOURCE: Final = "x-amz-copy-source"
_STATUS = {400: "400 Bad Request", 403: "403 Forbidden", 501: "501 Not Implemented", 503: "503 Service Unavailable"}


class Guard:
    """A WSGI application before another one, which is asked on behalf of the account whose key has signed."""

    def __init__(self, inner: Wsgi, find: Find, clock: Callable[[], float] = time.time) -> None:
        self._inner = inner
        self._find = find
        self._clock = clock
        self.verified: Callable[[dict[str, Any]], None] = lambda environ: None
        self._known: OrderedDict[tuple[str, ...], tuple[m.StoreKey, float]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with storebody.room() as room:  # moto has read the whole body when it answers
            try:
                account = self._account(environ, room)
            except SignatureError as error:
                return _refused(start, 403, error.kind, str(error))
            except storebody.BodyRefused as error:
                return _refused(start, error.status, error.kind, str(error))
            except (RpcError, concurrent.futures.TimeoutError):
                return _refused(start, 503, "ServiceUnavailable", "Who this is cannot be looked up now.")
            for name in [name for name in environ if name.startswith("HTTP_X_MOTO_") or name == "HTTP_X_AMZ_TARGET"]:
                del environ[name]
            environ["HTTP_X_MOTO_ACCOUNT_ID"] = account
            if _FORM.search(environ.get("CONTENT_TYPE", "")):  # which moto reads as if it were the query, in place of that
                environ["CONTENT_TYPE"] = "application/octet-stream"
            environ["HTTP_HOST"] = "localhost"  # moto takes a bucket from another name, and not from the path
            return self._inner(environ, start)

    def _account(self, environ: dict[str, Any], room: IO[bytes]) -> str:
        """Raises SignatureError, BodyRefused, RpcError."""
        path, _, query = str(environ["RAW_URI"]).partition("?")
        headers = {
            name[5:].replace("_", "-").lower(): " ".join(str(value).split()) for name, value in environ.items() if name.startswith("HTTP_")
        }
        headers |= {name.replace("_", "-").lower(): str(environ[name]) for name in ("CONTENT_TYPE", "CONTENT_LENGTH") if environ.get(name)}
        request = sigv4.SignedRequest(str(environ["REQUEST_METHOD"]), path, query, headers)
        claimed = sigv4.parse(request)
        sigv4.check_service(claimed, "s3")
        sigv4.check_time(claimed, SKEW_SECONDS, self._clock())
        sigv4.check_signed(request, claimed)
        _check_one_reading(request)
        said = headers.get(sigv4.BODY_HASH)
        storebody.check_form(said, claimed.lives_seconds is not None)
        action, resource = asks(request.method, path, query)
        known = self._key(claimed, action, resource)
        # S3 signs the path as it is on the wire, and encodes it no second time.
        wanted = sigv4.signature(request, claimed, known.signing, _UNSIGNED if said is None else said, path)
        if not hmac.compare_digest(wanted.encode(), claimed.digest.encode("utf-8", "surrogateescape")):
            raise SignatureError("SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided.")
        self.verified(environ)
        judged = [(action, resource)]
        if _removes_many(request):
            bucket = resource.removesuffix("*")
            removed = storebody.removals(environ, said)
            judged = [("s3:DeleteObjectVersion" if version else "s3:DeleteObject", f"{bucket}{key}") for key, version in removed]
        if _SOURCE in headers:
            source, _, version = headers[_SOURCE].partition("?")
            judged.append(asks("GET", quote("/" + unquote(source).lstrip("/")), version))
        for action, resource in judged:
            if not self._key(claimed, action, resource).is_allowed:
                raise SignatureError("AccessDenied", f"{claimed.key} is not authorized to perform: {action} on resource: {resource}")
        if not _removes_many(request):
            storebody.hold(environ, said, storechunks.Chain(claimed, known.signing), room)
        return known.account

    def _key(self, claimed: sigv4.Signature, action: str, resource: str) -> m.StoreKey:
        at = (claimed.key, claimed.token, claimed.day, claimed.region, action, resource)
        with self._lock:
            found, until = self._known.get(at, (None, 0.0))
        if found is not None and until > self._clock():
            return found
        found = self._find(m.StoreKeyRequest(*at))
        if found is None:
            raise SignatureError("InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.")
        with self._lock:
            self._known[at] = (found, self._clock() + _KNOWN_SECONDS)
            while len(self._known) > _KNOWN:
                self._known.popitem(last=False)
        return found


def asks(method: str, path: str, query: str) -> tuple[str, str]:
    """Returns the action and the resource that a request is judged by (Service Authorization Reference, S3). What changes a bucket beside
    making and removing it counts as PutBucketPolicy. DeleteObjects is judged by each key that its body has (`_removes_many`)."""
    bucket, _, key = unquote(path).lstrip("/").partition("/")
    if not bucket:
        return "s3:ListAllMyBuckets", "*"
    arn = f"arn:aws:s3:::{bucket}/{key}" if key else f"arn:aws:s3:::{bucket}"
    named = _named(query)
    of_version = "Version" if "versionId" in named else ""
    if method in ("GET", "HEAD"):
        return f"s3:GetObject{of_version}" if key else "s3:ListBucket", arn
    if method == "DELETE" and (key or not named):
        return f"s3:DeleteObject{of_version}" if key else "s3:DeleteBucket", arn
    if not key and method == "POST" and "delete" in named:
        return "s3:DeleteObject", f"{arn}/*"
    if key:
        return f"s3:GetObject{of_version}" if method == "POST" and "select" in named else "s3:PutObject", arn
    return "s3:CreateBucket" if method == "PUT" and not named else "s3:PutBucketPolicy", arn


def _pairs(query: str) -> list[tuple[str, str]]:
    return parse_qsl(query, keep_blank_values=True)


def _named(query: str) -> set[str]:
    return {name for name, _ in _pairs(query) if not name.startswith("X-Amz-")} - {"x-id"}


def _removes_many(request: sigv4.SignedRequest) -> bool:
    """Says whether this is DeleteObjects, whose bucket `_check_one_reading` has seen to be one."""
    return request.method == "POST" and "delete" in _named(request.query)


def _check_one_reading(request: sigv4.SignedRequest) -> None:
    """Refuses what moto, which takes targets and sources of copies for URLs, would read as another bucket or key than the one that is
    judged, and objects whose key stands in a form or in the query. Raises SignatureError."""
    if not request.path.startswith("/") or "#" in request.path + request.query:
        raise SignatureError("InvalidURI", "The target must be a path.")
    if not _BUCKET.fullmatch(request.path.lstrip("/").partition("/")[0]):
        raise SignatureError("InvalidBucketName", "The specified bucket is not valid.")
    _, _, key = unquote(request.path).lstrip("/").partition("/")
    if request.method == "POST" and (not key) is not _removes_many(request):
        raise SignatureError("MethodNotAllowed", "The key of an object must stand in the path.")
    if request.method == "POST" and "select" in _named(request.query) and _named(request.query) & _OTHER_POSTS:
        raise SignatureError("InvalidArgument", "A request is either SelectObjectContent or another operation.")
    source = request.headers.get(_SOURCE, "")
    if any(name == "versionId" and not value for text in (request.query, source.partition("?")[2]) for name, value in _pairs(text)):
        raise SignatureError("InvalidArgument", "Version id cannot be the empty string.")
    try:
        is_path = urlparse(source).path == source.partition("?")[0]
    except ValueError:
        is_path = False
    if not is_path:
        raise SignatureError("InvalidArgument", "The source of a copy must have the form <bucket>/<key>, URL-encoded.")


def _refused(start: Callable[..., Any], status: int, code: str, text: str) -> Iterable[bytes]:
    body = f"<Error><Code>{escape(code)}</Code><Message>{escape(text)}</Message></Error>".encode()
    start(_STATUS[status], [("Content-Type", "application/xml"), ("Content-Length", str(len(body))), ("Connection", "close")])
    return [body]


class Asked:
    """Control, for threads that wait for its answer."""

    def __init__(self, path: Path) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="control", daemon=True).start()
        self._client = asyncio.run_coroutine_threadsafe(self._connect(path), self.loop).result(_ASK_SECONDS)

    async def _connect(self, path: Path) -> Client:
        return Client(path)

    def find(self, asked: m.StoreKeyRequest) -> m.StoreKey | None:
        """Raises RpcError, TimeoutError."""
        call = self._client.call("store_key", asked, m.StoreKey | None, timeout=_ASK_SECONDS)
        found = asyncio.run_coroutine_threadsafe(call, self.loop).result(2 * _ASK_SECONDS)
        return found if isinstance(found, m.StoreKey) else None


class _Handler(WSGIRequestHandler):
    timeout = _SILENT_SECONDS  # of a thread that waits for its client (socketserver.StreamRequestHandler)


def s3() -> Wsgi:
    """S3 alone of all that moto simulates, and no bucket but one's own."""
    os.environ["MOTO_S3_ALLOW_CROSSACCOUNT_ACCESS"] = "false"
    from moto.moto_server.werkzeug_app import create_backend_app

    return create_backend_app("s3")


def make_server(sock: socket.socket, guard: Guard, loop: asyncio.AbstractEventLoop, most: int, head_seconds: float) -> BoundedServer:
    """All clients are this host's, and so no address has a bound of its own."""
    server = BoundedServer(sock, guard, _Handler, Connections(most, most, head_seconds), loop)
    guard.verified = server.verified
    return server


def main() -> None:
    settings = process.settings()
    own_walls.raise_walls("store", settings)
    threading.stack_size(_STACK_BYTES)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    (sock,) = process.inherited()["store"]
    asked = Asked(settings.control_socket)
    server = make_server(sock, Guard(s3(), asked.find), asked.loop, _CONNECTIONS, settings.api.head_seconds)
    setattr(server, "service_actions", process.live)  # noqa: B010 - called twice a second by the loop that accepts (socketserver)
    process.ready()
    server.serve_forever()


if __name__ == "__main__":
    main()
