"""Names that a microVM may reach, as its connector's security groups give them.

`https:api.github.com` is TLS to port 443 whose client names that host; `http:deb.example.org` plain HTTP to port 80; another port stands
behind the name. `https:*.example.org` is any one label before example.org, as in a certificate (RFC 6125, 6.4.3). `tcp:db.example.org:5432`
is any protocol: what it says cannot be looked at, so there the address alone counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gateway.messages import HOST_PORTS

HTTPS, HTTP, TCP = "https", "http", "tcp"


@dataclass(frozen=True)
class HostRule:
    scheme: str
    name: str  # without `*.`
    is_wild: bool
    port: int

    def covers(self, name: str) -> bool:
        if not self.is_wild:
            return name == self.name
        label, _, rest = name.partition(".")
        return bool(label) and rest == self.name


def parse(text: str) -> HostRule:
    """Of a text that has the form of gateway.messages.HOST_RULE."""
    scheme, name, *port = text.split(":")
    return HostRule(scheme, name.removeprefix("*."), name.startswith("*."), int(port[0]) if port else HOST_PORTS[scheme])


class AllowList:
    def __init__(self, rules: Iterable[str]) -> None:
        self.rules = tuple(map(parse, rules))
        self._names = {rule.name for rule in self.rules if not rule.is_wild}
        self._wild = {rule.name for rule in self.rules if rule.is_wild}

    def names(self, name: str) -> bool:
        """Whether a host may be asked for by this name."""
        return name in self._names or self.is_wild(name)

    def is_wild(self, name: str) -> bool:
        """Whether a guest has made up a part of the name."""
        return name not in self._names and bool(name.partition(".")[0]) and name.partition(".")[2] in self._wild

    def takes(self, scheme: str, name: str, port: int) -> bool:
        return any(rule.scheme == scheme and rule.port == port and rule.covers(name) for rule in self.rules)

    def tcp_names(self, port: int) -> list[str]:
        return [rule.name for rule in self.rules if rule.scheme == TCP and rule.port == port]

    def schemes(self, port: int) -> set[str]:
        return {rule.scheme for rule in self.rules if rule.port == port}
