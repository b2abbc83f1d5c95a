"""Calls for a running microVM's sockets: by edges for what they connect with, by control for what the guest asks on, and its agent's."""

from __future__ import annotations

from gateway import messages as m
from gateway.rpc import Connection, Reply

from ..network import Network
from ..vms import VmRegistry

_SOCKETS_MOST = 32


class NetworkCalls:
    def __init__(self, network: Network, vms: VmRegistry) -> None:
        self._network, self._vms = network, vms

    async def rpc_agent(self, connection: Connection, body: m.SessionRef) -> Reply:
        entry = self._vms.require(body.session, body.incarnation)
        await entry.machine.checked()
        return Reply(None, [await entry.machine.agent()])

    async def rpc_sockets(self, connection: Connection, body: m.SocketsRequest) -> Reply:
        entry = self._vms.require(body.session, body.incarnation)
        sockets = await self._network.sockets(entry.link, max(1, min(body.count, _SOCKETS_MOST)))
        return Reply(None, [sock.detach() for sock in sockets])

    async def rpc_services(self, connection: Connection, body: m.ServicesRequest) -> Reply:
        """Returns the sockets on which the guest asks for metadata (TCP) and names (UDP, TCP): control answers there. Where hosts are
        allowed by name, the one that connections to these come to is the last."""
        entry = self._vms.require(body.session, body.incarnation)
        return Reply(None, await self._network.services(entry.link, body.is_named))
