"""What a session's egress connector lets it reach."""

from __future__ import annotations

from gateway.config import Egress
from gateway.messages import EgressRules

from .store import Store

_INTERNET = ":aws-network-connector:INTERNET_EGRESS"


def rules_of(settings: Egress, store: Store, connectors: list[str]) -> EgressRules | None:
    """Returns what the connectors let a session reach; None where that is nothing: egress is closed, or the connector was deleted."""
    if settings.closed or not connectors:
        return None
    if connectors[0].endswith(_INTERNET):
        return EgressRules()
    connector = store.connectors.get(connectors[0])
    if connector is None:
        return None
    egress = connector.egress
    networks = [network for subnet in egress["SubnetIds"] for network in settings.subnets.get(subnet, [])]
    ports = [port for group in egress.get("SecurityGroupIds") or [] for port in settings.security_groups.get(group, [])]
    return EgressRules(False, networks, ports) if networks else None
