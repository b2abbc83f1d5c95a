"""The API put together: every target, and what a call passes on its way."""

from __future__ import annotations

from aiohttp import web

from gateway.accounts.directory import Directory
from gateway.accounts.quotas import Buckets, limited
from gateway.observe.audit import AuditTrail
from gateway.sessions.logs import LogStore

from .connections import Connections
from .connectors import Connectors
from .images import Images
from .logs import Logs
from .microvms import Microvms
from .model import Model
from .permissions import Permissions
from .server import ApiServer
from .service import Service
from .service_quotas import ServiceQuotas
from .tags import Tags


def make(
    service: Service, directory: Directory, logs: LogStore, audit: AuditTrail, architecture: str, connections: Connections
) -> web.Application:
    settings = service.settings
    targets: list[object] = [Microvms(service), Images(service, architecture), Connectors(service), Tags(service)]
    quotas = ServiceQuotas(limited(service.quotas), service.pager, settings.region)
    server = ApiServer(
        Model(settings.limits.min_idle_seconds), targets, [Logs(logs, settings.region), quotas], directory, Permissions(service),
        Buckets(service.quotas), audit, settings.region, settings.api.clock_skew_seconds, settings.api.body_seconds,
    )  # fmt: skip
    server.verified = connections.verified
    server.application.middlewares.append(connections.watch)
    return server.application
