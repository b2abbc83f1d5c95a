"""What each operation asks of a caller's policies: an action and the resources (service reference, 7 and section 2).

Calls on a microVM are judged by its image's ARN, because microVMs have none; connectors and roles are passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gateway.accounts.model import PASSED_TO, Caller
from gateway.accounts.policy import TAG_KEYS, TAGS, Decision

from .errors import AccessDenied
from .service import Service, check_image_arn

RESOURCE_TAG, REQUEST_TAG = TAGS
_WHY = {
    Decision.IMPLICIT_DENY: "because no identity-based policy allows the {} action",
    Decision.EXPLICIT_DENY: "with an explicit deny in an identity-based policy",
}


class Permissions:
    def __init__(self, service: Service) -> None:
        self._service = service

    def check(self, caller: Caller, operation: str, call: dict[str, Any]) -> list[str]:
        """Returns the resources that the call is about. Raises AccessDenied, Validation for what is no ARN."""
        context = caller.context() | _request_context(call)
        resources = []
        for action, resource, tags in self._asked(caller, operation, call):
            keys = context | _tags(RESOURCE_TAG, tags)
            if action == "iam:PassRole":
                keys[PASSED_TO] = ["lambda.amazonaws.com"]
            decision = caller.policy.decide(action, resource, keys)
            is_ours = resource == "*" or action == "lambda:PassNetworkConnector" or self._is_own(caller, resource)
            if decision is not Decision.ALLOW or not is_ours:
                why = _WHY.get(decision, _WHY[Decision.IMPLICIT_DENY]).format(action)
                raise AccessDenied(f"User: {caller.arn} is not authorized to perform: {action} on resource: {resource} {why}")
            if resource.count(":") >= 5:
                resources.append(resource)
        return resources

    def _is_own(self, caller: Caller, resource: str) -> bool:
        """Within the caller's account, and well-formed: no policy reaches into another's."""
        parts = resource.split(":", 6)
        if len(parts) < 6:
            return False
        if resource.startswith(self._service.managed_base):
            return True
        return parts[4] == caller.account and not (parts[2] == "lambda" and "/" in parts[5])

    def _asked(self, caller: Caller, operation: str, call: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, str]]]:
        service, action = self._service, f"lambda:{operation}"
        if "microvmIdentifier" in call:
            session = service.session_of(caller, call["microvmIdentifier"])
            # One that is not there is judged like one of any image: who may not ask learns nothing.
            arn = session.image_arn if session is not None else service.image_arn(caller, "*")
            yield action, arn, service.image_tags(arn)
        elif operation in ("RunMicrovm", "CreateMicrovmImage", "UpdateMicrovmImage"):
            text = "Malformed ARN - doesn't start with 'arn:'" if operation == "RunMicrovm" else "Invalid ARN format: {}"
            arn = service.image_arn(caller, call["name"]) if "name" in call else check_image_arn(call["imageIdentifier"], text)
            yield action, arn, service.image_tags(arn)
            yield from self._passed(call, operation == "RunMicrovm")
        elif operation.startswith("ListManaged"):
            yield action, "*", {}
        elif "imageIdentifier" in call and not operation.startswith("ListMicrovms"):
            arn = check_image_arn(call["imageIdentifier"], "Invalid ARN format: {}")
            yield action, arn, service.image_tags(arn)
        elif "Resource" in call:
            yield action, call["Resource"], service.tags_of(call["Resource"])
        elif "Identifier" in call:
            arn = service.connector_arn(caller, call["Identifier"])
            yield action, arn, service.tags_of(arn)
        else:
            yield action, "*", {}

    def _passed(self, call: dict[str, Any], runs: bool) -> Iterator[tuple[str, str, dict[str, str]]]:
        service = self._service
        given = list(call.get("egressNetworkConnectors") or [service.managed_connector("INTERNET_EGRESS")])
        if runs:
            given += call.get("ingressNetworkConnectors") or [service.managed_connector("HTTP_INGRESS")]
        for connector in given:
            yield "lambda:PassNetworkConnector", connector, service.tags_of(connector)
        role = call.get("executionRoleArn") if runs else call.get("buildRoleArn")
        if role:
            yield "iam:PassRole", role, {}


def _request_context(call: dict[str, Any]) -> dict[str, list[str]]:
    tags = call.get("tags") or call.get("Tags") or {}
    keys = list(tags) or list(call.get("TagKeys") or [])
    return {TAG_KEYS: keys, **_tags(REQUEST_TAG, tags)}


def _tags(prefix: str, tags: dict[str, Any]) -> dict[str, list[str]]:
    """Names of condition keys do not tell upper from lower case, a tag's in one neither: two that differ in nothing else are one key with
    two values."""
    found: dict[str, list[str]] = {}
    for name, value in tags.items():
        found.setdefault(f"{prefix}{name.lower()}", []).append(str(value))
    return found
