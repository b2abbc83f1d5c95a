"""The whole API over HTTP, for real clients, on a thread of its own; only the host and the build pipeline are scripted."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import ssl
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import uvloop
from aiohttp import web
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from output_shapes import faults
from scripted_host import ScriptedHost, no_services
from waiting import until

from gateway import listeners
from gateway.accounts.directory import Directory
from gateway.api import application
from gateway.api.connections import Connections, Listener
from gateway.api.paging import Pager
from gateway.api.service import Service
from gateway.config import Settings
from gateway.images.artifact import BuildFailed
from gateway.images.pipeline import Job, machine_shape
from gateway.images.registry import Registry
from gateway.messages import HostInfo
from gateway.observe.audit import AuditTrail
from gateway.sessions.host import RpcError
from gateway.sessions.lifecycle import Lifecycle
from gateway.sessions.logs import LogStore
from gateway.sessions.quarantine import Quarantine
from gateway.sessions.routes import Routes
from gateway.sessions.store import Store
from gateway.tokens import Minter

ACCOUNT, OTHER = "123456789012", "210987654321"
KEY, SECRET = "AKIAROOTROOTROOTROOT", "root-secret"
REGION = "us-east-1"
BASE = f"arn:aws:lambda:{REGION}:aws:microvm-image:al2023-1"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/build"
HOOKS = {"port": 9000, "microvmImageHooks": {"ready": "ENABLED"}, "microvmHooks": {"run": "ENABLED"}}


def image_arn(name: str, account: str = ACCOUNT) -> str:
    return f"arn:aws:lambda:{REGION}:{account}:microvm-image:{name}"


def connector(name: str) -> str:
    return f"arn:aws:lambda:{REGION}:aws:network-connector:aws-network-connector:{name}"


class ScriptedPipeline:
    """Builds succeed at once; those of an image in `held` wait for their event, those in `failing` fail with the reason, those in
    `refused` before they wait for their turn; those in `broken` end with an error that nobody expects."""

    def __init__(self) -> None:
        self.held: dict[str, asyncio.Event] = {}
        self.failing: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.broken: dict[str, str] = {}
        self.deleted: list[str] = []
        self.aside: list[str] = []
        self.stuck: set[str] = set()  # keys, whose images the host cannot delete
        self.order: list[str] = []

    async def check(self, job: Job) -> None:
        if job.image.name in self.refused:
            raise BuildFailed("", self.refused[job.image.name])

    def set_aside(self, job: Job) -> None:
        pass

    async def run(self, job: Job) -> None:
        self.order.append(f"{job.image.name} {job.version.version}")
        if job.image.name in self.held:
            await self.held[job.image.name].wait()
        if job.image.name in self.broken:
            raise RuntimeError(self.broken[job.image.name])
        if job.image.name in self.failing:
            raise BuildFailed("", self.failing[job.image.name])
        info = HostInfo("tcg", "", "qemu", 4096, 2, "x86_64")
        job.version.shape = machine_shape(int(job.version.request["resources"][0]["minimumMemoryInMiB"]), info)
        job.build.memory_bytes, job.build.disk_bytes, job.build.code_bytes = 1 << 20, 2 << 20, 3 << 20

    async def clean(self, job: Job, keep_image: bool) -> None:
        pass

    async def set_image_aside(self, key: str) -> None:
        self.aside.append(key)

    async def delete(self, key: str) -> None:
        if key in self.stuck:
            raise RpcError("Unavailable", "the disk is away")
        self.deleted.append(key)


class ApiRig:
    def __init__(self, directory: Path, tls: ssl.SSLContext | None = None, **settings: Any) -> None:
        self.directory = directory
        self.tls = tls
        directory.mkdir(exist_ok=True)
        self.settings = Settings(root=directory, limits={"min_idle_seconds": 1, **settings.pop("limits", {})}, **settings)
        self.wall = 0.0
        self.answered: set[str] = set()  # operations
        self.loop = uvloop.new_event_loop()  # as the service has
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.host = ScriptedHost()
        self.pipeline = ScriptedPipeline()
        self.do(self._start())

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine on the service's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    async def _start(self) -> None:
        self.store = Store(self.directory / "state.db")
        await self.store.open()
        self.logs = LogStore(self.directory / "logs")
        self.lifecycle = Lifecycle(self.settings, self.store, self.host, Routes(0, 0.1), self.logs, no_services)  # type: ignore[arg-type]
        self.registry = Registry(self.store, self.logs, 2, 2)
        self.registry.pipeline = self.pipeline  # type: ignore[assignment]
        self.accounts = Directory(self.store, ACCOUNT, {KEY: SECRET}, b"seal")
        self.audit = AuditTrail(self.directory / "audit")
        self.registry.ahead = self.lifecycle.ahead
        self.service = service = Service(
            self.settings, self.store, self.lifecycle, self.registry, self.host,  # type: ignore[arg-type]
            Quarantine(self.settings.quarantine, self.store, self.host, self.lifecycle),  # type: ignore[arg-type]
            Minter(self.directory / "keys.json"), Pager(b"pages"), 443,
        )  # fmt: skip
        api = self.settings.api
        self.connections = Connections(api.connections, api.connections_per_peer, api.head_seconds)
        served = application.make(service, self.accounts, self.logs, self.audit, "x86_64", self.connections)
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
        self._runner = web.AppRunner(served, access_log=None)
        await self._runner.setup()
        sock = listeners.listen("127.0.0.1", 0, "api")
        self.port = int(sock.getsockname()[1])
        assert self._runner.server is not None
        self._listener = Listener(sock, self._runner.server, self.connections, self.tls)

    async def _stop(self) -> None:
        await self._listener.close()
        await self._runner.cleanup()
        await self.registry.close()
        await self.lifecycle.close()
        await self.store.close()
        self.audit.close()
        await asyncio.sleep(0)  # connections that were closed have tasks that end
        for guest in self.host.guests:
            guest.close()

    def restart(self) -> None:
        """As after kill -9 of control: what is in the store is all that is known."""
        self.do(self._stop())
        self.do(self._start())
        self.do(self.registry.recover())

    def close(self) -> None:
        self.do(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    # ---- clients ----

    def client(self, name: str = "lambda-microvms", key: tuple[str, ...] = (KEY, SECRET)) -> Any:
        config = Config(retries={"max_attempts": 0}, parameter_validation=False, read_timeout=30)
        return boto3.client(
            name, region_name=REGION, endpoint_url=f"http://127.0.0.1:{self.port}", aws_access_key_id=key[0],
            aws_secret_access_key=key[1], aws_session_token=key[2] if len(key) > 2 else None, config=config,
        )  # fmt: skip

    def raw(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, key: tuple[str, ...] = (KEY, SECRET),
        sign: bool = True,
    ) -> tuple[int, dict[str, str], bytes]:  # fmt: skip
        """A request of exactly this path; `body` is JSON unless it is bytes. Every answer is held against botocore's models."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        request = AWSRequest(
            method, f"http://127.0.0.1:{self.port}{path}", data=data, headers={"Content-Type": "application/json"} | (headers or {})
        )
        if sign:
            SigV4Auth(Credentials(*key), "lambda", REGION).add_auth(request)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, data, dict(request.prepare().headers))
            answer = connection.getresponse()
            status, fields, said = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()
        if "json" in fields.get("content-type", "json"):
            operation, wrong = faults(method, path, status, fields.get("x-amzn-errortype", ""), json.loads(said) if said else None)
            assert not wrong, (wrong, said[:2000])
            self.answered |= {operation.name} if operation is not None and status < 300 else set()
        return status, fields, said

    def call(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, str, dict[str, Any]]:
        """(status, error type, JSON body)."""
        status, headers, data = self.raw(method, path, body, **more)
        return status, headers.get("x-amzn-errortype", ""), json.loads(data) if data else {}

    # ---- things ----

    def image(self, name: str, built: bool = True, **request: Any) -> str:
        """An image whose first version is built; its ARN."""
        body = {"baseImageArn": BASE, "buildRoleArn": ROLE, "codeArtifact": {"uri": "s3://bucket/app.zip"}, "name": name, **request}
        status, _, made = self.call("POST", "/2025-09-09/microvm-images", body)
        assert status == 201, made
        if built:
            self.settled(made["imageArn"])
        return str(made["imageArn"])

    def settled(self, arn: str) -> dict[str, Any]:
        """Waits for the end of the image's build; the image."""
        self.settled_in(arn)
        return dict(self.client().get_microvm_image(imageIdentifier=arn))

    def settled_in(self, arn: str) -> None:
        self.do(until(lambda: self.store.images[arn].state not in ("CREATING", "UPDATING"), 30))

    def run(self, arn: str, wait: str = "RUNNING", **request: Any) -> str:
        """A microVM in the state; its id."""
        status, _, made = self.call("POST", "/2025-09-09/microvms", {"imageIdentifier": arn, **request})
        assert status == 200, made
        self.reach(made["microvmId"], wait)
        return str(made["microvmId"])

    def reach(self, identifier: str, state: str) -> None:
        self.do(until(lambda: self.store.sessions[identifier].state.public == state, 30))

    def records(self, trail: str = f"{ACCOUNT}/audit.jsonl") -> list[dict[str, Any]]:
        """An account's audit trail; `refused.jsonl` has the refusals of callers whom nobody knows."""
        return [json.loads(line) for line in (self.directory / "audit" / trail).read_text().splitlines()]


def encoded(arn: str) -> str:
    return quote(arn, safe="")


# ---- for the rows of the reference ----

VMS, IMAGES, TAGS = "/2025-09-09/microvms", "/2025-09-09/microvm-images", "/2017-03-31/tags"
DETAILS = {"resourceId": None, "resourceType": None}
PLAIN, HOOKED = image_arn("plain"), image_arn("hooked")


@contextlib.contextmanager
def with_images(directory: Path) -> Iterator[ApiRig]:
    """A service with two images that are built: PLAIN, and HOOKED with every hook."""
    one = ApiRig(directory)
    one.image("plain")
    one.image("hooked", hooks=HOOKS)
    yield one
    one.close()


def refused(answer: tuple[int, str, dict[str, Any]], status: int, kind: str, text: str, **members: Any) -> None:
    assert (answer[0], answer[1]) == (status, kind), answer
    assert answer[2] == {"message": text, **members}


def create(api: ApiRig, name: str = "refused", **request: Any) -> tuple[int, str, dict[str, Any]]:
    body = {"baseImageArn": BASE, "buildRoleArn": ROLE, "codeArtifact": {"uri": "s3://bucket/app.zip"}, "name": name, **request}
    return api.call("POST", IMAGES, {member: value for member, value in body.items() if value is not None})


def run(api: ApiRig, arn: str = PLAIN, **request: Any) -> tuple[int, str, dict[str, Any]]:
    return api.call("POST", VMS, {"imageIdentifier": arn, **request})
