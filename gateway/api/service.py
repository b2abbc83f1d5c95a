"""What the API's operations share: settings, store, lifecycle, and the forms of names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gateway.config import Settings
from gateway.images.registry import Registry
from gateway.sessions.actions import Actions
from gateway.sessions.host import Host
from gateway.sessions.lifecycle import Lifecycle
from gateway.sessions.store import Store
from gateway.tokens import Minter

from .errors import Validation
from .paging import Pager


@dataclass
class Service:
    settings: Settings
    store: Store
    lifecycle: Lifecycle
    actions: Actions
    registry: Registry
    host: Host
    minter: Minter
    pager: Pager
    endpoint_port: int

    @property
    def managed_base(self) -> str:
        return f"arn:aws:lambda:{self.settings.region}:aws:microvm-image:al2023-1"

    def managed_connector(self, name: str) -> str:
        return f"arn:aws:lambda:{self.settings.region}:aws:network-connector:aws-network-connector:{name}"

    def endpoint_text(self, endpoint: str) -> str:
        """The endpoint as clients use it: a bare host name, with the port only where it is not 443."""
        return endpoint if self.endpoint_port == 443 else f"{endpoint}:{self.endpoint_port}"

    def check_connectors(self, given: list[str], kinds: tuple[str, ...]) -> list[str]:
        """Only managed connectors exist here. Raises Validation in the recorded words."""
        known = {
            self.managed_connector(name): name for name in ("HTTP_INGRESS", "SHELL_INGRESS", "ALL_INGRESS", "NO_INGRESS", "INTERNET_EGRESS")
        }
        for arn in given:
            if not arn.startswith("arn:"):
                raise Validation("Malformed network connector ARN")
            if known.get(arn) not in kinds:
                raise Validation(f"Unrecognized managed network connector ARN: {arn}")
        return given


def check_image_arn(identifier: str, text: str) -> str:
    if not identifier.startswith("arn:"):
        raise Validation(text.format(identifier))
    return identifier


def reply(members: tuple[str, ...], values: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """All modelled members, null where absent, and the unmodelled ones that recordings show."""
    return {name: values.get(name) for name in members} | extra
