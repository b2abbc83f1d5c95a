"""The embedded object store for demos and tests: moto's S3 server on an inherited socket. Its objects live in memory."""

from __future__ import annotations

import logging

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from . import process


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    (sock,) = process.inherited()["store"]
    address = sock.getsockname()
    server = make_server(address[0], address[1], DomainDispatcherApplication(create_backend_app), threaded=True, fd=sock.fileno())
    setattr(server, "service_actions", process.live)  # noqa: B010 - called twice a second by the loop that accepts (socketserver)
    process.ready()
    server.serve_forever()


if __name__ == "__main__":
    main()
