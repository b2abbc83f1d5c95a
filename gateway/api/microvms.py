"""The operations on microVMs (service reference, 1.3, 1.4, 2 and 3.3)."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Sequence
from typing import Any

from gateway.accounts.model import Caller
from gateway.accounts.quotas import LONGEST_LIFE_SECONDS, disk_gib
from gateway.images.pipeline import read_hooks
from gateway.sessions.actions import Arrival
from gateway.sessions.host import RpcError
from gateway.sessions.logs import default_group, default_stream
from gateway.sessions.model import IdlePolicy, Session, Version
from gateway.sessions.states import Action, Event, State, reason_of
from gateway.sessions.store import StoreError
from gateway.tokens import ALL_PORTS, LONGEST_SECONDS, SHELL, TOKEN_MAX_BYTES, TokenTooLong

from .client_tokens import Remember, TokenMismatch
from .errors import Conflict, InsufficientCapacity, InternalServer, NotFound, QuotaExceeded, Throttling, Validation
from .service import EGRESS, INGRESS, Service, reply

_AWAY_SECONDS = 0.005
_RESUMED_SECONDS = 5.0
_VM_MEMBERS = (
    "microvmId", "state", "endpoint", "imageArn", "imageVersion", "executionRoleArn", "idlePolicy",
    "maximumDurationInSeconds", "startedAt", "terminatedAt", "stateReason", "terminationReasonCode",
    "ingressNetworkConnectors", "egressNetworkConnectors",
)  # fmt: skip


class Microvms:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._store = service.store

    # ---- RunMicrovm ----

    async def run_microvm(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        token = call.pop("clientToken", None)
        try:
            return await self._service.client_tokens.once(
                caller.account, "run", token, call, lambda remember: self._run(caller, call, remember),
                lambda reply: reply["microvmId"] in self._store.sessions,
            )  # fmt: skip
        except TokenMismatch:
            raise Conflict("The client token was used before with other parameters.") from None

    async def _run(self, caller: Caller, call: dict[str, Any], remember: Remember) -> dict[str, Any]:
        await self._admit(self._admissible(caller, call))
        session = self._admissible(caller, call)  # again, because others came, and images and connectors went, while this waited
        store, lifecycle = self._store, self._service.lifecycle
        store.put_session(session)
        store.add_event(session.id, "run", "", session.state.value)
        answer = self._describe(session)
        remember(answer)
        arrival = Arrival(store.begin_commit(lambda: lifecycle.routes.publish(session)))
        lifecycle.launch(session, arrival)
        try:
            await asyncio.shield(arrival.stored)
        except StoreError:
            lifecycle.discard(session)
            raise
        # A guest that ran ahead is told to run before its answer is made, which would take this process from it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_AWAY_SECONDS):
                await arrival.is_away.wait()
        lifecycle.timers.watch_lifetime(session)
        return answer

    def _admissible(self, caller: Caller, call: dict[str, Any]) -> Session:
        """Returns the session that the call asks for, which nothing that is known speaks against. Raises ApiError."""
        session = self._session(caller, call, self._version(call))
        self._check_quota(session)
        return session

    def _version(self, call: dict[str, Any]) -> Version:
        arn = call["imageIdentifier"]
        image = self._store.images.get(arn)
        wanted = call.get("imageVersion")
        version = None
        if image is not None and image.state in ("CREATED", "UPDATED", "UPDATING", "UPDATE_FAILED"):
            version = image.find(wanted) if wanted else image.latest_active
        if version is None or not version.is_runnable:
            raise NotFound(f"No active version found for MicroVM image {arn}{f' and version {wanted}' if wanted else ''}")
        return version

    def _session(self, caller: Caller, call: dict[str, Any], version: Version) -> Session:
        service, settings = self._service, self._service.settings
        hooks = read_hooks(version.request)
        if call.get("runHookPayload") is not None and hooks.timeout("run") is None:
            raise Validation("The run hook must be enabled in the MicroVM image to pass the run hook payload")
        logging = call.get("logging") or {}
        if "cloudWatch" in logging and call.get("executionRoleArn") is None:
            raise Validation("Logging cannot be enabled without providing executionRoleArn")
        target = logging.get("cloudWatch") or {}
        policy = call.get("idlePolicy")
        if policy is not None and policy["maxIdleDurationSeconds"] > LONGEST_LIFE_SECONDS:
            raise Validation(f"maxIdleDurationSeconds must be at most {LONGEST_LIFE_SECONDS}")
        ingress = service.check_connectors(caller, call.get("ingressNetworkConnectors") or [], INGRESS)
        egress = service.check_connectors(caller, call.get("egressNetworkConnectors") or [], EGRESS)
        if len(egress) > 1:
            raise Validation("Only one egress network connector can be provided")
        name, now = version.image_arn.rpartition(":")[2], time.time()
        session = Session(
            id=f"microvm-{uuid.uuid4()}",
            endpoint=f"{uuid.uuid4()}.lambda-microvm.{settings.region}.{settings.domain}",
            image_arn=version.image_arn, image_version=version.version, image=version.key,
            minimum_mib=version.shape.baseline_mib if version.shape else 0,
            started_at=now, max_duration=call.get("maximumDurationInSeconds") or LONGEST_LIFE_SECONDS,
            execution_role=call.get("executionRoleArn"),
            idle_policy=None if policy is None else IdlePolicy(
                policy["maxIdleDurationSeconds"], policy["suspendedDurationSeconds"], policy["autoResumeEnabled"]
            ),
            ingress=ingress or [service.managed_connector("HTTP_INGRESS")],
            egress=egress or list(version.request.get("egressNetworkConnectors") or []),
            hooks=hooks, run_hook_payload=call.get("runHookPayload"),
            accelerator=version.shape.accelerator if version.shape else "tcg",
        )  # fmt: skip
        if session.execution_role is not None and "disabled" not in logging:
            session.log_group = target.get("logGroup") or default_group(name)
            session.log_stream = target.get("logStream") or default_stream(version.version, session.id, now)
        return session

    def _check_quota(self, session: Session) -> None:
        quotas = self._service.quotas
        # Those that ended lately are among them.
        has_number = bool(quotas.microvms) and len(self._store.order(session.account)) >= quotas.microvms
        if not (quotas.memory_mib or quotas.disk_gib or has_number):
            return
        live = [s.minimum_mib for s in self._store.sessions_of(session.account) if not s.state.is_ended]
        if quotas.memory_mib and sum(live) + session.minimum_mib > quotas.memory_mib:
            raise QuotaExceeded("The base maximum allocated memory limit has been reached for this account.")
        if has_number and len(live) >= quotas.microvms:
            raise QuotaExceeded(f"The maximum number of MicroVMs has been reached for this account: {quotas.microvms}.")
        if quotas.disk_gib and sum(map(disk_gib, live)) + disk_gib(session.minimum_mib) > quotas.disk_gib:
            raise QuotaExceeded(f"The maximum disk of all MicroVMs has been reached for this account: {quotas.disk_gib} GiB.")

    async def _admit(self, session: Session) -> None:
        try:
            has_room = await self._service.lifecycle.room.take(is_new=True, disk=disk_gib(session.minimum_mib) << 30)
        except RpcError as error:
            raise InsufficientCapacity(f"The host cannot launch MicroVMs now: {error}") from error
        if not has_room:
            lack = self._service.lifecycle.room.lack
            raise InsufficientCapacity(f"The host has no room for another MicroVM ({lack}): terminate or suspend some, and try again.")

    # ---- reads ----

    def _find(self, caller: Caller, call: dict[str, Any]) -> Session:
        session = self._service.session_of(caller, call["microvmIdentifier"])
        if session is None:
            raise NotFound(f"MicroVM not found: {call['microvmIdentifier']}")
        return session

    def _describe(self, session: Session) -> dict[str, Any]:
        policy = session.idle_policy
        return reply(
            _VM_MEMBERS,
            {
                "microvmId": session.id,
                "state": session.state.public,
                "endpoint": self._service.endpoint_text(session.endpoint),
                "imageArn": session.image_arn,
                "imageVersion": session.image_version,
                "executionRoleArn": session.execution_role,
                "idlePolicy": policy and {
                    "maxIdleDurationSeconds": policy.max_idle,
                    "suspendedDurationSeconds": policy.suspended,
                    "autoResumeEnabled": policy.auto_resume,
                },
                "maximumDurationInSeconds": session.max_duration,
                "startedAt": round(session.started_at, 3),
                "terminatedAt": session.terminated_at and round(session.terminated_at, 3),
                "stateReason": session.reason,
                "ingressNetworkConnectors": session.ingress,
                "egressNetworkConnectors": session.egress,
            },
        )  # fmt: skip

    async def get_microvm(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        return self._describe(self._find(caller, call))

    async def list_microvms(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        arn, version = call.get("imageIdentifier"), call.get("imageVersion")
        order: Sequence[tuple[float, str]] = self._store.order(caller.account)
        if arn is not None or version is not None:
            sessions = self._store.sessions
            order = [
                key for key in order
                if arn in (None, sessions[key[1]].image_arn) and version in (None, sessions[key[1]].image_version)
            ]  # fmt: skip
        page, token = self._service.pager.page_of_keys(f"microvms {caller.account}", order, call)
        items = [
            {
                "microvmId": s.id, "state": s.state.public, "imageArn": s.image_arn,
                "imageVersion": s.image_version, "startedAt": round(s.started_at, 3),
            }
            for s in (self._store.sessions[name] for _, name in page)
        ]  # fmt: skip
        return {"items": items, "nextToken": token}

    # ---- transitions ----

    async def suspend_microvm(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        return await self._fire(self._find(caller, call), Event.SUSPEND)

    async def resume_microvm(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        session = self._find(caller, call)
        has_failed = session.state is State.SUSPENDED and session.reason is not None
        if session.state is State.SUSPENDED and not await self._has_room():
            lack = self._service.lifecycle.room.lack
            raise Throttling(f"The host has no room to resume the MicroVM now ({lack}): try again.", retry_after=5)
        answer = await self._fire(session, Event.RESUME)
        if has_failed:  # who calls again after a failure is told what becomes of it
            await self._service.lifecycle.resumed(session, _RESUMED_SECONDS)
            if session.state is State.SUSPENDED and session.refusal:
                raise Conflict(session.reason or session.refusal)
            if session.state is State.SUSPENDED and session.reason is not None:
                raise InternalServer(session.reason, retry_after=1)
        return answer

    async def _has_room(self) -> bool:
        try:
            return await self._service.lifecycle.room.take()
        except RpcError as error:
            raise InternalServer(f"The host cannot resume MicroVMs now: {error}: try again.", retry_after=1) from error

    async def terminate_microvm(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        session = self._find(caller, call)
        if session.state is State.TERMINATED and session.is_aside:  # an error ended it, and its user gives up what was saved
            try:
                await self._service.quarantine.release(session)
            except RpcError as error:
                raise InternalServer(f"The host cannot remove what is set aside of the MicroVM now: {error}: try again.") from error
        return await self._fire(session, Event.TERMINATE)

    async def _fire(self, session: Session, event: Event) -> dict[str, Any]:
        action = await self._service.lifecycle.fire(session, event, reason_of(event))
        if action is Action.CONFLICT:
            raise Conflict(f"The MicroVM {session.id} is {session.state.public}: wait until it is RUNNING.")
        if action is Action.REFUSE:
            raise Validation(f"The MicroVM {session.id} has been terminated and its state cannot be changed.")
        return {}

    # ---- tokens ----

    async def create_microvm_auth_token(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        session = self._find(caller, call)
        minutes = self._minutes(call, session)
        ports = [port for entry in call["allowedPorts"] for port in _ports(entry)]
        try:
            token = self._service.minter.mint(session.id, ports, minutes * 60)
        except TokenTooLong as error:
            raise Validation(f"allowedPorts: {error}, more than {TOKEN_MAX_BYTES}: name wider ranges, or allPorts") from error
        return {"authToken": {"X-aws-proxy-auth": token}}

    async def create_microvm_shell_auth_token(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        session = self._find(caller, call)
        minutes = self._minutes(call, session)
        names = {arn.rpartition(":")[2] for arn in session.ingress}
        if "ALL_INGRESS" in names and len(names) > 1:
            raise Validation(
                "ALL_INGRESS cannot be combined with other ingress network connectors; use HTTP_INGRESS and/or SHELL_INGRESS instead"
            )
        if not names & {"SHELL_INGRESS", "ALL_INGRESS"}:
            raise Validation("Shell access requires SHELL_INGRESS network connector to be configured on the MicroVM.")
        return {"authToken": {"X-aws-proxy-auth": self._service.minter.mint(session.id, [], minutes * 60, SHELL)}}

    def _minutes(self, call: dict[str, Any], session: Session) -> int:
        minutes = int(call["expirationInMinutes"])
        if minutes * 60 > LONGEST_SECONDS:
            raise Validation(f"ExpirationMinutes {minutes} exceeded max allowed of {LONGEST_SECONDS // 60}.")
        if session.state.is_ended:
            raise Validation(f"The MicroVM {session.id} has been terminated and its state cannot be changed.")
        return minutes


def _ports(entry: dict[str, Any]) -> list[tuple[int, int]]:
    if "port" in entry:
        return [(entry["port"], entry["port"])]
    if "range" in entry:
        first, last = entry["range"]["startPort"], entry["range"]["endPort"]
        if first > last:
            raise Validation(f"startPort {first} is greater than endPort {last}")
        return [(first, last)]
    if "allPorts" in entry:
        return list(ALL_PORTS)
    raise Validation("Each entry of allowedPorts must have one of port, range, allPorts")
