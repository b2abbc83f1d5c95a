"""Tags on images and connectors (service reference, 1.1: the classic tags of Lambda)."""

from __future__ import annotations

from typing import Any

from gateway.accounts.model import Caller
from gateway.sessions.model import Connector, Image

from .errors import InvalidParameter, NotFound, ResourceConflict, Validation
from .service import Service

_MOST = 50
_OWN = "Tag keys that begin with aws: are reserved."
_TOO_MANY = f"A resource has at most {_MOST} tags."


def fault_of(tags: dict[str, str]) -> str:
    """Returns what speaks against a resource's having these tags; the empty string where nothing does."""
    if any(name.lower().startswith("aws:") for name in tags):
        return _OWN
    return _TOO_MANY if len(tags) > _MOST else ""


class Tags:
    def __init__(self, service: Service) -> None:
        self._store = service.store

    async def tag_resource(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        resource = self._find(caller, call["Resource"])
        tags = {**resource.tags, **call["Tags"]}
        if fault := fault_of(tags):
            raise InvalidParameter(fault) if fault == _OWN else Validation(fault)
        return await self._set(resource, tags)

    async def untag_resource(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        resource = self._find(caller, call["Resource"])
        return await self._set(resource, {name: value for name, value in resource.tags.items() if name not in call["TagKeys"]})

    async def list_tags(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        return {"Tags": self._find(caller, call["Resource"]).tags}

    def _find(self, caller: Caller, arn: str) -> Image | Connector:
        resource = self._store.images.get(arn) or self._store.connectors.get(arn)
        if resource is None or resource.account != caller.account:
            raise NotFound(f"Resource not found: {arn}")
        return resource

    async def _set(self, resource: Image | Connector, tags: dict[str, str]) -> dict[str, Any]:
        if resource.state == "DELETING":
            raise ResourceConflict(f"The resource is being deleted: {resource.arn}")
        before, resource.tags = resource.tags, tags
        if isinstance(resource, Image):
            self._store.put_image(resource)
        else:
            self._store.put("connectors", resource.arn, resource)
        try:
            await self._store.commit()
        except BaseException:
            resource.tags = before
            raise
        return {}
