"""Network connectors: the six operations of Lambda Core (service reference, 9). VPC_EGRESS is the only kind there is.

Subnets and security groups are what the operator's configuration calls so: networks, and the ports that are open in them.
"""

from __future__ import annotations

import datetime
import re
import time
import uuid
from typing import Any

import msgspec

from gateway.accounts.model import Caller
from gateway.accounts.quotas import MOST_CONNECTORS
from gateway.sessions.model import Connector

from .client_tokens import Remember, TokenMismatch
from .errors import ConnectorLimit, CoreNotFound, InvalidParameter, ResourceConflict
from .service import Service
from .tags import fault_of

_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_NO_CHANGE = "No configuration changes detected"
# Required beyond the model when a connector is made, as recorded; an update without them leaves them as they are.
_REQUIRED = ("NetworkProtocol", "AssociatedComputeResourceTypes")


def iso8601(at: float) -> str:
    """Returns a time as lambda-core's model has all of its times."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def version_of(identifier: str) -> int | None:
    """Returns the version that an ARN ends with, where it has one."""
    parts = identifier.split(":")
    return int(parts[7]) if len(parts) == 8 and _VERSION.fullmatch(parts[7]) else None


class Connectors:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._store = service.store

    # ---- what is asked ----

    async def create_network_connector(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        token = call.pop("ClientToken", None)
        if not token:
            raise InvalidParameter("ClientToken is a required field")
        return await self._once(caller, "connector", token, call, lambda remember: self._create(caller, call, remember))

    async def _create(self, caller: Caller, call: dict[str, Any], remember: Remember) -> dict[str, Any]:
        configuration = self._checked(call["Configuration"], call.get("OperatorRole"))
        if fault := fault_of(call.get("Tags") or {}):
            raise InvalidParameter(fault)
        own = [connector for connector in self._store.connectors.values() if connector.account == caller.account]
        if any(connector.name == call["Name"] for connector in own):
            raise ResourceConflict(f"A network connector with the name '{call['Name']}' already exists in this account")
        if len(own) >= MOST_CONNECTORS:
            raise ConnectorLimit(f"The account has {MOST_CONNECTORS} network connectors, which is the limit.")
        identifier, now = f"nc-{uuid.uuid4()}", time.time()
        arn = f"arn:aws:lambda:{self._service.settings.region}:{caller.account}:network-connector:{identifier}"
        connector = Connector(
            arn, identifier, call["Name"], configuration, call["OperatorRole"], "PENDING", now,
            versions=[(1, now)], tags=call.get("Tags") or {},
        )  # fmt: skip
        answer = self._describe(connector)
        connector.state = "ACTIVE"  # nothing has to be made for it; the reply says PENDING, as recorded
        self._store.put("connectors", arn, connector)
        remember(answer)
        await self._commit_or_drop(connector)
        return answer

    async def _commit_or_drop(self, connector: Connector) -> None:
        try:
            await self._store.commit()
        except BaseException:
            self._store.connectors.pop(connector.arn, None)
            raise

    async def update_network_connector(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        token = call.pop("ClientToken", None)
        if not token:
            raise InvalidParameter("ClientToken is a required field")
        return await self._once(caller, "connector-update", token, call, lambda remember: self._update(caller, call, remember))

    async def _update(self, caller: Caller, call: dict[str, Any], remember: Remember) -> dict[str, Any]:
        connector = self._find(caller, call)
        role = call.get("OperatorRole") or connector.operator_role
        given = call.get("Configuration") or connector.configuration
        if egress := given.get("VpcEgressConfiguration"):
            kept = {name: connector.egress[name] for name in _REQUIRED if name in connector.egress}
            given = {**given, "VpcEgressConfiguration": kept | egress}
        configuration = self._checked(given, role)
        now = time.time()
        changes: dict[str, Any] = {"update_status": "Successful", "update_reason": _NO_CHANGE, "modified_at": now}
        if (configuration, role) != (connector.configuration, connector.operator_role):
            number = connector.version + 1
            changes |= {
                "configuration": configuration, "operator_role": role, "version": number, "update_reason": None,
                "versions": [*connector.versions, (number, now)],
                "past": connector.past | {connector.version: (connector.configuration, connector.operator_role)},
            }  # fmt: skip
        changed = msgspec.structs.replace(connector, **changes)
        answer = self._describe(changed, "LastModified", "LastUpdateStatus", "LastUpdateStatusReason")
        self._store.put("connectors", connector.arn, changed)
        remember(answer)
        await self._commit(connector)
        return answer

    async def delete_network_connector(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        """Idempotent, as the model says: one that was deleted before is no error. A version's ARN deletes that version alone."""
        arn, number = self._service.connector_arn(caller, call["Identifier"]), version_of(call["Identifier"])
        if arn not in self._store.connectors and (ended := await self._store.ended(arn)) is not None:
            identifier, _, name = ended.partition(" ")
            return {"Arn": f"{arn.rpartition(':')[0]}:{identifier}", "Name": name, "Id": identifier, "State": "DELETING"}
        connector = self._find(caller, call)
        if number is not None:
            return await self._delete_version(connector, number)
        if any(connector.arn in s.egress and not s.state.is_ended for s in self._store.sessions_of(caller.account)):
            raise ResourceConflict(f"The network connector {connector.id} is in use by MicroVMs.")
        self._store.drop("connectors", connector.arn)
        by_name = f"{connector.arn.rpartition(':')[0]}:{connector.name}"
        for subject in (connector.arn, by_name):  # as it may be named again
            self._store.add_event(subject, "deleted", connector.state, "DELETED", detail=f"{connector.id} {connector.name}")
        await self._commit(connector)
        return {**self._describe(connector), "State": "DELETING"}

    async def _delete_version(self, connector: Connector, number: int) -> dict[str, Any]:
        if number == connector.version:
            raise ResourceConflict(f"Version {number} is the latest of the network connector {connector.id}: delete the connector.")
        if number > connector.version:
            raise CoreNotFound(f"Network connector not found for: {connector.arn}:{number}")
        changed = msgspec.structs.replace(
            connector, versions=[one for one in connector.versions if one[0] != number],
            past={one: was for one, was in connector.past.items() if one != number},
        )  # fmt: skip
        self._store.put("connectors", connector.arn, changed)
        await self._commit(connector)
        of_version = {"VersionArn": f"{connector.arn}:{number}", "Version": number}
        return {"Arn": connector.arn, "Name": connector.name, "Id": connector.id, **of_version, "State": "DELETING"}

    async def _commit(self, before: Connector) -> None:
        try:
            await self._store.commit()
        except BaseException:
            self._store.connectors[before.arn] = before
            raise

    async def get_network_connector(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        """A version's ARN is answered with that version's configuration, and says so."""
        names = ("LastModified", "StateReason", "LastUpdateStatus", "LastUpdateStatusReason")
        connector, number = self._find(caller, call), version_of(call["Identifier"])
        if number is None:
            return self._describe(connector, *names)
        at = dict(connector.versions).get(number)
        if at is None:
            raise CoreNotFound(f"Network connector not found for: {connector.arn}:{number}")
        configuration, role = connector.past.get(number, (connector.configuration, connector.operator_role))
        of_version = msgspec.structs.replace(connector, configuration=configuration, operator_role=role, modified_at=at)
        return {**self._describe(of_version, *names), "VersionArn": f"{connector.arn}:{number}", "Version": number}

    async def list_network_connectors(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        own = [
            connector for connector in self._store.connectors.values()
            if connector.account == caller.account and call.get("State") in (None, connector.state)
        ]  # fmt: skip
        page, token = self._service.pager.page(f"connectors {caller.account}", own, lambda c: (c.versions[0][1], c.id), call)
        items = [
            {"Arn": c.arn, "Name": c.name, "Id": c.id, "Type": "VPC_EGRESS", "State": c.state, "LastModified": iso8601(c.modified_at)}
            for c in page
        ]
        return {"NetworkConnectors": items, **({"NextMarker": token} if token else {})}

    async def list_network_connector_versions(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        connector = self._find(caller, call)
        versions = connector.versions if call.get("State") in (None, connector.state) else []
        page, token = self._service.pager.page(connector.arn, versions, lambda v: (-v[0],), call)
        items = [
            {
                "Arn": connector.arn, "VersionArn": f"{connector.arn}:{number}", "Name": connector.name, "Id": connector.id,
                "Version": number, "State": connector.state, "LastModified": iso8601(at),
            }
            for number, at in page
        ]  # fmt: skip
        return {"NetworkConnectorVersions": items, **({"NextMarker": token} if token else {})}

    # ---- inside ----

    async def _once(self, caller: Caller, what: str, token: str, call: dict[str, Any], work: Any) -> dict[str, Any]:
        try:
            return await self._service.client_tokens.once(
                caller.account, what, token, call, work, lambda reply: reply["Arn"] in self._store.connectors
            )
        except TokenMismatch:
            raise ResourceConflict("The client token was used before with other parameters.") from None

    def _find(self, caller: Caller, call: dict[str, Any]) -> Connector:
        arn = self._service.connector_arn(caller, call["Identifier"])
        connector = self._store.connectors.get(arn)
        if connector is None or connector.account != caller.account:
            raise CoreNotFound(f"Network connector not found for: {arn}")
        return connector

    def _checked(self, configuration: dict[str, Any], role: str | None) -> dict[str, Any]:
        """Raises InvalidParameter, in the recorded words where there are some."""
        egress = configuration.get("VpcEgressConfiguration")
        if egress is None:
            raise InvalidParameter("VpcEgressConfiguration is a required field")
        if not role:
            raise InvalidParameter("NetworkConnectorOperatorRole is required for VPC_EGRESS connector type")
        for name in ("SubnetIds", *_REQUIRED):
            if not egress.get(name):
                raise InvalidParameter(f"{name} is a required field")
        settings = self._service.settings.egress
        for subnet in egress["SubnetIds"]:
            if subnet not in settings.subnets:
                raise InvalidParameter(f"The subnet ID '{subnet}' does not exist")
        for group in egress.get("SecurityGroupIds") or []:
            if group not in settings.security_groups:
                raise InvalidParameter(f"The security group '{group}' does not exist")
        return configuration

    def _describe(self, connector: Connector, *more: str) -> dict[str, Any]:
        """Members by operation, absent ones left out."""
        values = {
            "Arn": connector.arn, "Name": connector.name, "Id": connector.id, "Configuration": connector.configuration,
            "OperatorRole": connector.operator_role, "State": connector.state, "LastModified": iso8601(connector.modified_at),
            "StateReason": connector.reason, "LastUpdateStatus": connector.update_status,
            "LastUpdateStatusReason": connector.update_reason,
        }  # fmt: skip
        names = ("Arn", "Name", "Id", "Configuration", "OperatorRole", "State", *more)
        return {name: values[name] for name in names if values[name] is not None}
