"""What a session's egress connector lets it reach."""

from __future__ import annotations

import re

from gateway.config import Egress
from gateway.messages import HOST_RULE, EgressRules

from .store import Store

_INTERNET = ":aws-network-connector:INTERNET_EGRESS"
_HOST_RULE = re.compile(HOST_RULE)


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
    entries = [entry for group in egress.get("SecurityGroupIds") or [] for entry in settings.security_groups.get(group, [])]
    hosts = [entry for entry in entries if _HOST_RULE.match(entry)]
    ports = [entry for entry in entries if entry not in hosts]
    return EgressRules(False, networks, ports, hosts) if networks or hosts else None


def has_hosts(rules: EgressRules | None) -> bool:
    """Whether there are hosts that may be reached by their names."""
    return rules is not None and bool(rules.hosts)
