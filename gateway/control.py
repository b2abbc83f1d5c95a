"""Control: the only writer of state. The API, the lifecycle, image builds, the keys; no privileges.

`python -m gateway.control`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
from aiohttp import web

from . import executors, files, peers, process, status
from . import messages as m
from .accounts.admin import Admin
from .accounts.directory import Credentials, Directory
from .api import application
from .api.connections import KEPT_SECONDS, Certificate, Connections, Listener, Scrapers
from .api.paging import Pager
from .api.service import Service as ApiService
from .api.store_keys import StoreKeys
from .config import ConfigError, Settings, is_loopback
from .guest.credentials import Issuer
from .guest.egress_audit import EgressAudit
from .guest.services import Guests
from .images.pipeline import Job, Pipeline
from .images.registry import Registry
from .observe import health, metrics
from .observe.audit import AuditTrail
from .observe.spans import Spans
from .rpc import Client, Connection, Reply, RpcError, Server, Service
from .sessions.agent import AgentError
from .sessions.archive import Archive
from .sessions.archive import default_client as default_store
from .sessions.faults import FaultLog
from .sessions.host import Host
from .sessions.identity import Identity
from .sessions.lifecycle import Lifecycle
from .sessions.listeners import in_words
from .sessions.logs import LogStore
from .sessions.model import Session
from .sessions.quarantine import Quarantine
from .sessions.recovery import recover
from .sessions.routes import Routes
from .sessions.shipping import Shipper, default_client
from .sessions.states import Event, State
from .sessions.store import Store, StoreError
from .sessions.transitions import Observer
from .tokens import SHELL, Checker, Minter, TokenError

log = structlog.get_logger()

_HOUR_SECONDS = 3600.0
_LOGS_SECONDS = 300.0
_EGRESS_AUDIT_BYTES = float(256 << 20)  # of an account
_AUDIT_SECONDS = 1.0  # what a power cut may take of the audit trail
_EMPTY_SECONDS = 600.0
_CERTIFICATE_SECONDS = 30.0
_AWAY = "edge workers are not connected"
_LISTENERS_SECONDS = 2.0  # for a guest to say what listens in it


class Control:
    """Also the service that edges and vmm call."""

    def __init__(self, settings: Settings) -> None:
        directory = settings.control_dir
        self.settings = settings
        self.store = Store(directory / "torpor.db")
        self.minter = _minter(directory / "keys.json")
        self.routes = Routes(settings.edge.worker_count, settings.suspend.workers_seconds)
        self.routes.keys = self.minter.key_set()
        self._checker = Checker(self.routes.keys.keys, self.routes.keys.revoked)
        self._minting = asyncio.Lock()
        self.logs = LogStore(directory / "logs")
        self.faults = FaultLog(self.logs)
        self._explaining: set[str] = set()  # sessions whose guest is asked what listens
        self.audit = AuditTrail(directory / "audit")
        self.audit.adopt(settings.account)
        self._is_recovered = False
        self.vmm = Client(settings.vmm_socket, Service(self).only(peers.VMM_ASKS_CONTROL), self._vmm_came)
        self.host = Host(self.vmm, settings.root)
        self.spans = Spans(settings.traces.endpoint, "control")
        root_keys = self._access_keys()
        sealing = files.secret(directory / "sessions.key", "temporary credentials under way")
        self.directory = Directory(self.store, settings.account, root_keys, sealing)
        self.directory.remains = lambda account: bool(self.logs.groups(account)) or self.egress_audit.has(account)
        self.store_keys = StoreKeys(self.directory)
        archive = Archive(settings, self.host, lambda: default_store(settings, self._operators()))
        self.egress_audit = EgressAudit(directory / "egress")
        issuer = Issuer(settings.credentials, settings.region, self.directory)
        self.guests = Guests(settings, issuer, self.store, self.host, self.egress_audit)
        observer = Observer(
            metrics.transition, lambda session, steps: self.spans.steps(steps, session.id), metrics.action_took, self._out_of_memory
        )
        self.lifecycle = Lifecycle(settings, self.store, self.host, self.routes, self.logs, self.guests.for_session, archive, observer)
        self.quarantine = Quarantine(settings.quarantine, self.store, self.host, self.lifecycle)
        self.lifecycle.ahead.on_count = metrics.ran_ahead.set
        self.registry = Registry(self.store, self.logs, settings.images.concurrent_builds, settings.images.account_builds)
        self.registry.ahead = self.lifecycle.ahead
        self.registry.pipeline = Pipeline(settings, self.host, self._reads, self._phase, self.guests)

    def _operators(self) -> tuple[str, str]:
        """Of the object store that the settings name."""
        store = self.settings.object_store
        return (store.access_key, store.secret_key) if store.access_key else next(iter(self._access_keys().items()))

    def _reads(self, account: str) -> Credentials:
        """What an account's artifacts are read with, where no STS gives its build role some."""
        if self.settings.object_store.is_embedded:
            return self.store_keys.own(account)
        return Credentials(*self._operators(), "", math.inf)

    async def rpc_store_key(self, connection: Connection, body: m.StoreKeyRequest) -> m.StoreKey | None:
        return self.store_keys.find(body)

    def _access_keys(self) -> dict[str, str]:
        """Access key to secret, as the supervisor wrote them."""
        return files.access_keys(self.settings.control_dir / "access-keys.json")

    def api(self) -> ApiService:
        pager = Pager(files.secret(self.settings.control_dir / "pager.key", "page tokens under way"))
        return ApiService(
            self.settings, self.store, self.lifecycle, self.registry, self.host, self.quarantine, self.minter, pager,
            self.settings.edge.port,
        )  # fmt: skip

    def _out_of_memory(self, session: Session, line: str) -> None:
        self.faults.write(session, [line])
        metrics.out_of_memory.inc()

    def _phase(self, job: Job) -> None:
        self.store.put_image(job.image)
        self.store.add_event(job.image.arn, "build", job.version.version, job.build.phase)
        self.lifecycle.tasks.spawn(self.store.commit())

    # ---- start ----

    async def recover(self) -> None:
        """Compares the store with the host; nothing is served before routes are known. Raises ConfigError where they do not belong
        together."""
        await self.store.open()
        state = await self.host.state()
        await Identity(self.settings, self.store, self.host).check(state)
        await recover(self.lifecycle, state)
        await self.registry.recover()
        self._is_recovered = True

    async def _vmm_came(self, connection: Connection) -> None:
        """Once more: the first time, `recover` compares all."""
        if self._is_recovered:
            self.lifecycle.tasks.spawn(self.lifecycle.find_lost())

    async def suspend_all(self) -> None:
        """Before the service stops: every running session is suspended, and resumed at the next start. No request wakes one from now on:
        it would run on without a service, and be lost with its host."""
        self.lifecycle.is_stopping = True
        tried: set[tuple[str, int]] = set()
        try:
            async with asyncio.timeout(self.settings.suspend_seconds):
                while running := [
                    session for session in self.store.sessions.values()
                    if session.state is State.RUNNING and (session.id, session.incarnation) not in tried
                ]:  # fmt: skip
                    tried |= {(session.id, session.incarnation) for session in running}
                    await asyncio.gather(*map(self._suspend, running))
                    await self.lifecycle.quiet()  # one that was launched or resumed meanwhile runs then
            await self.host.leave()
        except TimeoutError:
            log.warning("stop.sessions_left_running")
        except RpcError as error:
            log.warning("stop.host_away", error=str(error))

    async def _suspend(self, session: Session) -> None:
        session.suspended_by = "stop"
        try:
            await self.lifecycle.fire(session, Event.SUSPEND)
        except StoreError as error:
            log.warning("stop.session_left_running", session=session.id, error=str(error))

    # ---- what edges and vmm call ----

    async def rpc_hello(self, connection: Connection, body: m.Hello) -> m.Table:
        """The connection is the worker: one that is being replaced has its successor's name."""
        connection.closed.add_done_callback(lambda _: self._worker_left(connection))
        return self.routes.add_worker(connection, body.worker)

    def _worker_left(self, worker: Connection) -> None:
        self.lifecycle.worker_left(worker)
        metrics.edge_left(worker)

    async def rpc_lookup(self, connection: Connection, body: m.LookupRequest) -> m.Route | None:
        return self.routes.find(body.endpoint)

    async def rpc_resume(self, connection: Connection, body: m.ResumeRequest) -> None:
        session = self.store.sessions.get(body.session)
        if session is None:
            return
        self.routes.holds(connection, session)
        if session.incarnation == body.incarnation:
            await self.lifecycle.request(session)

    async def rpc_counters(self, connection: Connection, body: m.Counters) -> None:
        metrics.edge_counted(connection, body)

    async def rpc_listened(self, connection: Connection, body: m.Listened) -> None:
        self.routes.listened(connection, body)

    async def rpc_faults(self, connection: Connection, body: m.Faults) -> None:
        for identifier, texts in body.lines.items():
            session = self.store.sessions.get(identifier)
            if session is None:
                continue
            if any(text.endswith(m.NOTHING_LISTENS) for text in texts) and identifier not in self._explaining:
                self._explaining.add(identifier)  # once at a time: a worker may be anybody's
                self.lifecycle.tasks.spawn(self._explain(session, texts))
            else:
                self.faults.write(session, texts)

    async def _explain(self, session: Session, texts: list[str]) -> None:
        """Writes lines, those about a port on which nothing listens with what does, where the guest says so in time."""
        others = ""
        try:
            others = in_words(await self.lifecycle.agent(session).listeners(_LISTENERS_SECONDS))
        except AgentError:
            pass
        finally:
            self._explaining.discard(session.id)
            self.faults.write(session, [text + others if text.endswith(m.NOTHING_LISTENS) else text for text in texts])

    async def rpc_microvm_log(self, connection: Connection, body: m.LogRequest) -> m.MicrovmLog:
        session = self.store.sessions.get(body.session)
        if connection.uid != 0 or session is None:
            raise RpcError("NotFound", f"MicroVM not found: {body.session}")
        return self.faults.read(session, body.after)

    async def rpc_egress_log(self, connection: Connection, body: m.EgressLogRequest) -> list[str]:
        """Returns lines of JSON (gateway/guest/egress_audit.py)."""
        session = self.store.sessions.get(body.session)
        if connection.uid != 0 or session is None:
            raise RpcError("NotFound", f"MicroVM not found: {body.session}")
        return await executors.LATENCY.run(self.egress_audit.read, session.account, session.id, body.after)

    async def rpc_shell(self, connection: Connection, body: m.ShellRequest) -> Reply:
        """Raises RpcError, ShellsFull, AgentError."""
        self._check_shell(body)
        session = self.store.sessions.get(body.session)
        if session is None or session.incarnation != body.incarnation:
            raise AgentError("the MicroVM is not running")
        return Reply(None, [self.lifecycle.agent(session).shells.open(body.columns, body.rows).detach()])

    def _check_shell(self, body: m.ShellRequest) -> None:
        """An edge alone opens none: a shell is root's. The token may have expired while its request was held. Raises RpcError."""
        try:
            grant = self._checker.verify(body.token, time.time() - self.settings.edge.hold_seconds)
        except TokenError as error:
            raise RpcError("NotAllowed", f"a shell needs its token: {error}") from error
        if grant.kind != SHELL or grant.session != body.session:
            raise RpcError("NotAllowed", "the token is not for this microVM's shell")

    async def rpc_traces(self, connection: Connection, body: m.SessionName) -> list[m.Trace]:
        """Returns the steps of a session's last launch or resume, and of its last suspend."""
        session = self.store.sessions.get(body.session)
        if connection.uid != 0 or session is None:
            raise RpcError("NotFound", f"MicroVM not found: {body.session}")
        own = [m.Trace(trace.work, trace.started_at, trace.steps) for trace in self.lifecycle.traces(session)]
        return own + await self.host.traces(session.id)

    async def tiers(self) -> dict[str, m.Tier]:
        """Returns where every sleeping session is."""
        held = {one.session: one for one in await self.host.warm()}
        found = {}
        for session in self.store.sessions.values():
            if session.state is not State.SUSPENDED:
                continue
            if session.archived is not None:
                found[session.id] = m.Tier("archived", session.archived.size)
            elif session.id in held:
                found[session.id] = m.Tier("warm", held[session.id].memory_bytes)
            else:
                found[session.id] = m.Tier("cold", session.snapshot_bytes)
        return found

    async def rpc_tiers(self, connection: Connection, body: None) -> dict[str, m.Tier]:
        if connection.uid != 0:
            raise RpcError("NotAllowed", "only root may ask")
        return await self.tiers()

    async def rpc_recover(self, connection: Connection, body: m.SessionName) -> None:
        """Raises RecoverError, RpcError, StoreError."""
        if connection.uid != 0:
            raise RpcError("NotAllowed", "only root may ask")
        await self.quarantine.recover(body.session)

    async def readiness(self) -> dict[str, health.Check]:
        """Returns whether new work would be taken, beside the processes' own health."""
        return {
            "vmm answers": await health.of_host(self.host.info),
            "disk": health.of_disk(lambda: self.host.free()[1], self.settings.limits.disk_reserve_mib),
        }  # fmt: skip

    async def rpc_activity(self, connection: Connection, body: m.Activity) -> None:
        self.lifecycle.activity(connection, body)

    async def rpc_ended(self, connection: Connection, body: m.Ended) -> None:
        self.lifecycle.hypervisor_ended(body)

    # ---- every hour ----

    async def drop_old_logs(self) -> None:
        """Removes streams that nobody has written to for longer than the retention, and those beyond an account's room and number."""
        logs = self.settings.logs
        seconds = logs.retention_days * 86_400.0 if logs.retention_days else math.inf
        await executors.BULK.run(self.logs.drop_old, seconds, float(logs.account_mib << 20), logs.account_streams)
        await executors.BULK.run(self.egress_audit.drop_old, seconds, _EGRESS_AUDIT_BYTES)

    async def prune(self) -> None:
        """Removes client tokens of before yesterday and old events."""
        await self.store.prune(self.settings.store.events_days * 86_400.0)

    async def sync_audit(self) -> None:
        await executors.UPKEEP.run(self.audit.sync)

    async def rotate_keys(self) -> None:
        """Makes a new key for tokens when the newest is old; it signs when the workers have what checks it, or after a later look."""
        async with self._minting:
            if await executors.LATENCY.run(self.minter.make_key_if_due):
                await self._switch_keys()

    async def _switch_keys(self) -> bool:
        if not await self._publish_keys():
            return False
        await executors.LATENCY.run(self.minter.use_newest)
        return True

    async def _publish_keys(self) -> bool:
        keys = self.minter.key_set()
        self._checker = Checker(keys.keys, keys.revoked)
        return await self.routes.publish_keys(keys)

    async def rpc_tokens_rotate(self, connection: Connection, body: None) -> None:
        """Raises RpcError."""
        async with self._minting:
            await executors.LATENCY.run(self.minter.make_key)
            if not await self._switch_keys():
                raise RpcError("Unavailable", f"the new key does not sign yet: {_AWAY}; it is tried again each hour")

    async def rpc_tokens_revoke(self, connection: Connection, body: m.RevokeRequest) -> float:
        """Returns the moment before which what was minted is none. Raises RpcError."""
        if body.session and body.session not in self.store.sessions:
            raise RpcError("NotFound", f"MicroVM not found: {body.session}")
        async with self._minting:
            try:
                before = await executors.LATENCY.run(self.minter.revoke, body.before, body.session)
            except ValueError as error:
                raise RpcError("Invalid", str(error)) from error
            if not await self._publish_keys():
                raise RpcError(
                    "Unavailable", f"{_AWAY} and may take tokens that were revoked until they are: repeat the command until it succeeds"
                )
        return before


async def every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    """Does work now and then, for ever: what it raises once keeps it from no later time."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("background.failed", work=work.__qualname__)
        await asyncio.sleep(seconds)


def _minter(path: Path) -> Minter:
    """Raises ConfigError for keys that cannot be read."""
    try:
        return Minter(path)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}: restore it from a backup, or remove it (access tokens become invalid)") from error


def listen(control: Control) -> Server:
    """Serves edge workers, and the host's root: each what is theirs to call."""
    settings = control.settings
    service = Service(control, Admin(settings, control.directory, control.store))
    theirs = {
        settings.users.edge: service.only(peers.EDGE_ASKS_CONTROL), settings.users.store: service.only(peers.STORE_ASKS_CONTROL),
        0: service.only(peers.ROOT_ASKS_CONTROL),
    }  # fmt: skip
    return Server(settings.control_socket, service, theirs, theirs)


async def main(settings: Settings) -> None:
    control = Control(settings)
    await control.recover()
    sockets = process.inherited()
    info = await control.host.info()
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # what is no HTTP is its sender's affair, answered 400
    connections = Connections(settings.api.connections, settings.api.connections_per_peer, settings.api.head_seconds)
    scrapers = Scrapers(settings.metrics_token if settings.api.metrics_token_file else None)
    watched = metrics.application(
        lambda: [session.state for session in control.store.sessions.values()], control.tiers, control.host.counts, scrapers.may_read
    )
    health.application(watched, lambda: status.checks(status.state_file(settings), time.time()), control.readiness, scrapers.may_read)
    watched.middlewares.append(connections.watch)
    certificate = Certificate(settings.tls_dir / "api.crt", settings.tls_dir / "api.key") if settings.api.tls else None
    tls = certificate.context if certificate is not None else None
    served = application.make(control.api(), control.directory, control.logs, control.audit, info.architecture, connections)
    runners, accepting = [], []
    for purpose, one, context in (
        ("api", served, tls), ("metrics", watched, None if is_loopback(settings.api.metrics_address) else tls)
    ):  # fmt: skip
        runner = web.AppRunner(one, access_log=None, keepalive_timeout=KEPT_SECONDS)
        await runner.setup()
        assert runner.server is not None
        accepting += [Listener(sock, runner.server, connections, context) for sock in sockets.get(purpose, [])]
        runners.append(runner)
    edges = listen(control)
    work = [
        every(_HOUR_SECONDS, control.rotate_keys), every(_LOGS_SECONDS, control.drop_old_logs), every(_HOUR_SECONDS, control.prune),
        every(_AUDIT_SECONDS, control.sync_audit), every(_EMPTY_SECONDS, control.quarantine.empty),
        every(_EMPTY_SECONDS, control.registry.sweep), control.logs.keep(),
    ]  # fmt: skip
    if certificate is not None:
        work.append(every(_CERTIFICATE_SECONDS, certificate.renew))
    if settings.logs.endpoint:
        shipper = Shipper(control.logs, settings.control_dir / "logs-sent.db", lambda: default_client(settings))
        work.append(shipper.run())
    background = [asyncio.get_running_loop().create_task(coroutine) for coroutine in work]
    process.ready()
    log.info("control.ready", sessions=len(control.store.sessions), images=len(control.store.images))
    stop, suspend = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)

    def suspend_and_stop() -> None:
        suspend.set()
        stop.set()

    loop.add_signal_handler(signal.SIGUSR1, suspend_and_stop)
    await stop.wait()
    for listener in accepting:
        await listener.close()
    for runner in runners:
        await runner.cleanup()
    if suspend.is_set():
        await control.suspend_all()
    for task in background:
        task.cancel()
    edges.close()
    await control.registry.close()
    await control.lifecycle.ahead.close()
    await control.lifecycle.close()
    await control.guests.close()
    await control.logs.close()
    await control.store.close()
    control.audit.close()


if __name__ == "__main__":
    process.run("control", main)
