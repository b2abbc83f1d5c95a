"""What the API's operations share: settings, store, lifecycle, and the forms of names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gateway.accounts import quotas
from gateway.accounts.model import Caller
from gateway.accounts.quotas import Profile
from gateway.config import Settings
from gateway.images.registry import Registry
from gateway.sessions.host import Host
from gateway.sessions.lifecycle import Lifecycle
from gateway.sessions.model import Session
from gateway.sessions.quarantine import Quarantine
from gateway.sessions.store import Store
from gateway.tokens import Minter

from .client_tokens import ClientTokens
from .errors import Validation
from .paging import Pager

INGRESS = ("HTTP_INGRESS", "SHELL_INGRESS", "ALL_INGRESS", "NO_INGRESS")
EGRESS = ("INTERNET_EGRESS",)


@dataclass
class Service:
    settings: Settings
    store: Store
    lifecycle: Lifecycle
    registry: Registry
    host: Host
    quarantine: Quarantine
    minter: Minter
    pager: Pager
    endpoint_port: int
    client_tokens: ClientTokens = field(init=False)
    quotas: Profile = field(init=False)

    def __post_init__(self) -> None:
        self.client_tokens = ClientTokens(self.store)
        self.quotas = quotas.of(self.settings.limits)

    @property
    def managed_base(self) -> str:
        return f"arn:aws:lambda:{self.settings.region}:aws:microvm-image:al2023-1"

    def managed_connector(self, name: str) -> str:
        return f"arn:aws:lambda:{self.settings.region}:aws:network-connector:aws-network-connector:{name}"

    def image_arn(self, caller: Caller, name: str) -> str:
        return f"arn:aws:lambda:{self.settings.region}:{caller.account}:microvm-image:{name}"

    def connector_arn(self, caller: Caller, identifier: str) -> str:
        """Returns a connector's ARN from its ARN (with or without a version), id or name."""
        if identifier.startswith("arn:"):
            return ":".join(identifier.split(":")[:7])
        for connector in self.store.connectors.values():
            if connector.account == caller.account and connector.name == identifier:
                return connector.arn
        return f"arn:aws:lambda:{self.settings.region}:{caller.account}:network-connector:{identifier}"

    def session_of(self, caller: Caller, identifier: str) -> Session | None:
        """Returns a microVM of the caller's account: another account's is as if it were not there."""
        session = self.store.sessions.get(identifier)
        return session if session is not None and session.account == caller.account else None

    def image_tags(self, arn: str) -> dict[str, str]:
        image = self.store.images.get(arn)
        return image.tags if image is not None else {}

    def tags_of(self, arn: str) -> dict[str, str]:
        connector = self.store.connectors.get(arn)
        return connector.tags if connector is not None else self.image_tags(arn)

    def endpoint_text(self, endpoint: str) -> str:
        """Returns the endpoint as clients use it: a bare host name, with the port only where it is not 443."""
        return endpoint if self.endpoint_port == 443 else f"{endpoint}:{self.endpoint_port}"

    def check_connectors(self, caller: Caller, given: list[str], kinds: tuple[str, ...]) -> list[str]:
        """Managed connectors of the `kinds`, and for egress the caller's own. Raises Validation in the recorded words."""
        known = {self.managed_connector(name): name for name in (*INGRESS, *EGRESS)}
        for arn in given:
            if not arn.startswith("arn:"):
                raise Validation("Malformed network connector ARN")
            own = self.store.connectors.get(arn) if kinds == EGRESS else None
            if own is not None and own.account == caller.account:
                if own.state != "ACTIVE":
                    raise Validation(f"The network connector {arn} is {own.state}: it must be ACTIVE")
            elif known.get(arn) not in kinds:
                raise Validation(f"Unrecognized managed network connector ARN: {arn}")
        return given


def check_image_arn(identifier: str, text: str) -> str:
    if not identifier.startswith("arn:"):
        raise Validation(text.format(identifier))
    return identifier


def reply(members: tuple[str, ...], values: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """Returns all modelled members, null where absent, and the unmodelled ones that recordings show."""
    return {name: values.get(name) for name in members} | extra
