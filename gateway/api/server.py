"""The control plane's HTTP server: one handler. A call's way: route, signature, rate, constraints, permission, operation,
reply, audit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec
import structlog
from aiohttp import web
from botocore import xform_name

from gateway.accounts.directory import Directory
from gateway.accounts.model import Caller
from gateway.accounts.quotas import RUN_CODE, Buckets
from gateway.observe.audit import AuditTrail, redacted
from gateway.sessions.states import IllegalTransition
from gateway.sessions.store import StoreError

from . import sigv4, sts
from .errors import (
    AccessDenied,
    ApiError,
    InternalServer,
    RequestTimeout,
    SignatureError,
    Throttling,
    Unserializable,
    Validation,
    as_modelled,
)
from .model import Model, Operation, parse_input
from .permissions import Permissions

log = structlog.get_logger()

STS = "sts.amazonaws.com"
_FORM = "application/x-www-form-urlencoded"
_BODY_MAX_BYTES = 1 << 20
_SMALL_BYTES = 64 << 10
_LARGE_BODIES = 64  # under way at once, of callers whose signature waits for them
_NOT_FOUND = (
    b"<html>\r\n<head><title>404 Not Found</title></head>\r\n<body>\r\n<center><h1>404 Not Found</h1></center>\r\n</body>\r\n</html>\r\n"
)
_COMPACT = json.JSONEncoder(separators=(",", ":"))
Handler = Callable[[Caller, dict[str, Any]], Awaitable[dict[str, Any]]]


class JsonService(Protocol):
    """A service of the AWS JSON 1.1 protocol beside Lambda: what it is called in X-Amz-Target and in the audit trail."""

    target_prefix: str
    source: str

    async def answer(self, caller: Caller, name: str, call: dict[str, Any]) -> dict[str, Any]: ...


class Unoffered(AccessDenied):
    """The Runtime operations: the service's gateway refuses them without a word."""

    def body(self) -> dict[str, object]:
        return {"message": None}


@dataclass
class Exchange:
    """One call on its way: what is known of it so far, for the audit trail."""

    request: web.Request
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    event: str = ""
    source: str = "lambda.amazonaws.com"
    operation: Operation | None = None
    caller: Caller | None = None
    access_key: str = ""
    call: dict[str, Any] | None = None
    resources: list[str] = field(default_factory=list)


class ApiServer:
    """`targets` have a coroutine for each operation they serve, named as boto3 names it."""

    def __init__(
        self, model: Model, targets: list[object], beside: list[JsonService], directory: Directory, permissions: Permissions,
        buckets: Buckets, audit: AuditTrail, region: str, skew_seconds: int, body_seconds: float,
    ) -> None:  # fmt: skip
        self._model = model
        self._hidden = model.secret_members
        self._beside = {one.target_prefix: one for one in beside}
        self._directory = directory
        self._sts = sts.Sts(directory)
        self._permissions = permissions
        self._buckets = buckets
        self._audit = audit
        self._region = region
        self._skew_seconds = skew_seconds
        self._body_seconds = body_seconds
        self._large_bodies = 0
        self.verified: Callable[[web.Request], None] = lambda request: None
        self._handlers: dict[str, Handler] = {}
        for operation in model.operations:
            name = xform_name(operation.name)
            handler = next((getattr(target, name) for target in targets if hasattr(target, name)), None)
            if handler is not None:
                self._handlers[operation.name] = handler
        self.application = web.Application(client_max_size=_BODY_MAX_BYTES, middlewares=[])
        self.application.router.add_route("*", "/{path:.*}", self._handle)

    async def _handle(self, request: web.Request) -> web.Response:
        exchange = Exchange(request)
        try:
            status, body = await self._answer(exchange)
        except ApiError as error:
            return self._failed(exchange, error)
        except web.HTTPRequestEntityTooLarge:
            return self._failed(exchange, Validation(f"The request body is larger than {_BODY_MAX_BYTES} bytes.", status=413))
        except (StoreError, IllegalTransition) as error:
            log.error("api.failed", path=request.path, error=str(error))
            return self._failed(exchange, InternalServer(str(error), retry_after=1))
        except Exception:
            log.exception("api.failed", path=request.path)
            return self._failed(exchange, InternalServer("An internal error occurred; the service's log has the details."))
        headers = {"x-amzn-requestid": exchange.id}
        if exchange.source == STS:
            self._record(exchange, None, None)
            return web.Response(status=200, text=body, content_type="text/xml", headers=headers)
        if status == 404:
            return web.Response(status=404, body=_NOT_FOUND, content_type="text/html", headers=headers)
        self._record(exchange, None, body)
        if status == 204:
            return web.Response(status=204, headers=headers)
        return web.Response(status=status, body=_COMPACT.encode(body).encode(), content_type="application/json", headers=headers)

    def _failed(self, exchange: Exchange, error: ApiError) -> web.Response:
        if exchange.operation is not None:
            error = as_modelled(error, exchange.operation.errors)
        self._record(exchange, error, None)
        headers = {"x-amzn-requestid": exchange.id, "x-amzn-errortype": error.kind}
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        if exchange.source == STS:
            return web.Response(status=error.status, text=sts.failure(error, exchange.id), content_type="text/xml", headers=headers)
        is_json11 = any(exchange.source == one.source for one in self._beside.values())
        body = error.body() | ({"__type": error.kind} if is_json11 else {})  # where JSON 1.1 has the type
        return web.Response(status=error.status, body=_COMPACT.encode(body).encode(), content_type="application/json", headers=headers)

    # ---- a call's way ----

    async def _answer(self, exchange: Exchange) -> tuple[int, Any]:
        """Returns the status, and what its body says: JSON, for STS a document, for 404 nothing."""
        request = exchange.request
        path, _, query = request.raw_path.partition("?")
        if request.method == "POST" and path == "/" and request.content_type == _FORM:
            return 200, await self._answer_sts(exchange, query)
        prefix, _, name = request.headers.get("X-Amz-Target", "").rpartition(".")
        if (beside := self._beside.get(prefix)) is not None:
            return 200, await self._answer_beside(beside, exchange, path, query, name)
        found = None if prefix else self._model.find(request.method, path)
        if found is None:
            return 404, None
        operation, members = found
        exchange.operation, exchange.event = operation, operation.name
        caller, body = await self._authenticate(exchange, path, query)
        if not operation.is_offered:
            raise Unoffered("")
        self._throttle(caller, operation)
        call = exchange.call = parse_input(operation, members, query, _parse(body))
        exchange.resources = self._permissions.check(caller, operation.name, call)
        return operation.status, await self._handlers[operation.name](caller, call)

    async def _answer_beside(self, service: JsonService, exchange: Exchange, path: str, query: str, name: str) -> dict[str, Any]:
        exchange.event, exchange.source = name, service.source
        caller, body = await self._authenticate(exchange, path, query)
        call = exchange.call = _parse(body) or {}
        if not isinstance(call, dict):
            raise Unserializable("Expected a JSON object")
        return await service.answer(caller, name, call)

    async def _answer_sts(self, exchange: Exchange, query: str) -> str:
        exchange.event, exchange.source = "Sts", STS
        caller, body = await self._authenticate(exchange, "/", query)
        answer = self._sts.answer(caller, body)
        exchange.event = answer.action
        return sts.document(answer, exchange.id)

    async def _authenticate(self, exchange: Exchange, path: str, query: str) -> tuple[Caller, bytes]:
        """Returns who calls, and the body, which is not read for somebody whom nobody knows."""
        request, keys = exchange.request, self._directory
        headers = {name.lower(): ",".join(" ".join(value.split()) for value in request.headers.getall(name)) for name in request.headers}
        signed = sigv4.SignedRequest(request.method, path, query, headers)
        claimed = sigv4.parse(signed)
        exchange.access_key = claimed.key
        sigv4.check_service(claimed, exchange.source.partition(".")[0])
        secret = keys.secret(claimed.key, claimed.token)
        sigv4.check_head(signed, claimed, secret, self._region, self._skew_seconds)
        if sigv4.BODY_HASH in headers and not keys.is_expired(claimed.token):  # the whole signature is right: it makes no room for others
            self.verified(request)
        body = await self._body(request)
        sigv4.check_body(replace(signed, body=body), claimed, secret or "")
        if keys.is_expired(claimed.token):
            raise SignatureError("ExpiredTokenException", "The security token included in the request is expired")
        exchange.caller = keys.caller(
            claimed.key, claimed.token, source=request.remote or "", user_agent=request.headers.get("User-Agent", ""),
            secure=request.secure, region=self._region, at=time.time(),
        )  # fmt: skip
        self.verified(request)
        return exchange.caller, body

    async def _body(self, request: web.Request) -> bytes:
        """Raises ApiError for one that comes too slowly, or where too many large ones are under way."""
        if not request.body_exists:
            return b""
        with self._room(request.content_length or _BODY_MAX_BYTES):
            try:
                async with asyncio.timeout(self._body_seconds):
                    return await request.read()
            except TimeoutError:
                raise RequestTimeout(f"The request body did not arrive within {self._body_seconds:g} seconds.") from None

    @contextlib.contextmanager
    def _room(self, size: int) -> Iterator[None]:
        if size <= _SMALL_BYTES:
            yield
            return
        if self._large_bodies >= _LARGE_BODIES:
            raise Throttling("Too many large requests are under way", 1, serviceCode="lambda")
        self._large_bodies += 1
        try:
            yield
        finally:
            self._large_bodies -= 1

    def _throttle(self, caller: Caller, operation: Operation) -> None:
        wait = self._buckets.wait_seconds(caller.account, operation.name)
        if not wait:
            return
        after = max(1, round(wait + 0.5))
        if operation.name == "RunMicrovm":  # of the others' rates no code is public
            raise Throttling("Rate exceeded", after, serviceCode="lambda", quotaCode=RUN_CODE)
        raise Throttling("Rate exceeded", after, serviceCode="lambda")

    # ---- audit ----

    def _record(self, exchange: Exchange, error: ApiError | None, reply: dict[str, Any] | None) -> None:
        """Raises nothing: what was carried out is answered, whatever becomes of its record."""
        if not exchange.event:
            return
        try:
            parts = self._parts(exchange, error, reply)
        except Exception:
            log.exception("audit.incomplete", call=exchange.event)
            parts = {"requestID": exchange.id, "userIdentity": _identity(exchange.access_key, exchange.caller)}
        self._audit.write(exchange.event, exchange.caller.account if exchange.caller is not None else None, **parts)

    def _parts(self, exchange: Exchange, error: ApiError | None, reply: dict[str, Any] | None) -> dict[str, Any]:
        reads = exchange.event.startswith(("Get", "List", "Describe", "Filter"))
        caller = exchange.caller
        return {
            "eventSource": exchange.source,
            "userIdentity": _identity(exchange.access_key, caller),
            "awsRegion": self._region,
            "sourceIPAddress": exchange.request.remote,
            "userAgent": exchange.request.headers.get("User-Agent"),
            "requestParameters": redacted(exchange.call, self._hidden),
            "responseElements": None if reads else redacted(reply, self._hidden),
            **({"errorCode": error.kind, "errorMessage": str(error)} if error is not None else {}),
            "requestID": exchange.id,
            "eventID": str(uuid.uuid4()),
            "resources": [{"ARN": arn, "accountId": arn.split(":")[4], "type": _type(arn)} for arn in exchange.resources],
            "recipientAccountId": caller.account if caller is not None else None,
        }


def _identity(access_key: str, caller: Caller | None) -> dict[str, Any]:
    if caller is None:  # whose signature was wrong, or missing
        return {"type": "Unknown", "accessKeyId": access_key or None}
    identity = {"type": caller.kind, "arn": caller.arn, "accountId": caller.account, "accessKeyId": caller.access_key}
    return identity | ({"userName": caller.name} if caller.kind == "IAMUser" else {})


def _type(arn: str) -> str:
    kinds = {"microvm-image": "AWS::Lambda::MicrovmImage", "network-connector": "AWS::Lambda::NetworkConnector"}
    return kinds.get(arn.split(":")[5].partition("/")[0], "AWS::IAM::Role")


def _parse(body: bytes) -> Any:
    if not body:
        return None
    try:
        return msgspec.json.decode(body)  # which takes Unicode texts alone: no half of a surrogate pair, which nothing can store
    except (ValueError, RecursionError) as error:
        raise Unserializable("The request body is not valid JSON") from error
