"""The control plane's HTTP server: aiohttp, one handler; signature, route, constraints, operation, reply."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from aiohttp import web
from botocore import xform_name

from gateway.sessions.states import IllegalTransition
from gateway.sessions.store import StoreError

from . import sigv4
from .errors import ApiError, InternalServer, SignatureError, Validation
from .logs import TARGET_PREFIX, Logs
from .model import Model, parse_input

log = structlog.get_logger()

_BODY_MAX_BYTES = 1 << 20
Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class ApiServer:
    """`targets` have a coroutine for each operation they serve, named as boto3 names it."""

    def __init__(self, model: Model, targets: list[object], logs: Logs, secrets: dict[str, str], region: str, skew_seconds: int) -> None:
        self._model = model
        self._logs = logs
        self._secrets = secrets
        self._region = region
        self._skew_seconds = skew_seconds
        self._handlers: dict[str, Handler] = {}
        for operation in model.operations:
            name = xform_name(operation.name)
            handler = next((getattr(target, name) for target in targets if hasattr(target, name)), None)
            if handler is not None:
                self._handlers[operation.name] = handler
        self.application = web.Application(client_max_size=_BODY_MAX_BYTES, middlewares=[])
        self.application.router.add_route("*", "/{path:.*}", self._handle)

    async def _handle(self, request: web.Request) -> web.Response:
        request_id = str(uuid.uuid4())
        try:
            status, body = await self._answer(request)
        except ApiError as error:
            return self._error(error, request_id)
        except web.HTTPRequestEntityTooLarge:
            return self._error(Validation(f"The request body is larger than {_BODY_MAX_BYTES} bytes."), request_id)
        except (StoreError, IllegalTransition) as error:
            log.error("api.failed", path=request.path, error=str(error))
            return self._error(InternalServer(str(error), retry_after=1), request_id)
        except Exception:
            log.exception("api.failed", path=request.path)
            return self._error(InternalServer("An internal error occurred; the service's log has the details."), request_id)
        if body is None:
            return web.Response(status=status, text="Not Found" if status == 404 else "", headers={"x-amzn-requestid": request_id})
        return web.Response(
            status=status, body=json.dumps(body, separators=(",", ":")).encode(), content_type="application/json",
            headers={"x-amzn-requestid": request_id},
        )  # fmt: skip

    def _error(self, error: ApiError, request_id: str) -> web.Response:
        headers = {"x-amzn-requestid": request_id, "x-amzn-errortype": error.kind}
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        return web.Response(status=error.status, body=json.dumps(error.body()).encode(), content_type="application/json", headers=headers)

    async def _answer(self, request: web.Request) -> tuple[int, dict[str, Any] | None]:
        path, _, query = request.raw_path.partition("?")
        target = request.headers.get("X-Amz-Target", "")
        found = None if target else self._model.find(request.method, path)
        if found is None and not target.startswith(TARGET_PREFIX):
            return 404, None
        body = await request.read()
        self._check_signature(request, path, query, body)
        content = _parse(body)
        if found is None:
            name = re.sub(r"(?<!^)(?=[A-Z])", "_", target.removeprefix(TARGET_PREFIX)).lower()
            handler = getattr(self._logs, name, None)
            if handler is None:
                raise SignatureError("UnknownOperationException", f"{target} is not served here")
            return 200, await handler(content or {})
        operation, members = found
        call = parse_input(operation, members, query, content)
        serve = self._handlers.get(operation.name)
        if serve is None:
            return 404, None
        return operation.status, await serve(call)

    def _check_signature(self, request: web.Request, path: str, query: str, body: bytes) -> None:
        headers = {name.lower(): ",".join(request.headers.getall(name)) for name in request.headers}
        signed = sigv4.SignedRequest(request.method, path, query, headers, body)
        sigv4.verify(signed, self._secrets, self._region, self._skew_seconds)


def _parse(body: bytes) -> Any:
    if not body:
        return None
    try:
        return json.loads(body)
    except ValueError as error:
        raise Validation("The request body is not valid JSON.") from error
