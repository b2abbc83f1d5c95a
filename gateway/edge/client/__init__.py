"""The side towards clients: what accepts them, their protocols, and the exchange of a request for its answer."""

from gateway.edge import native

native.lead(__path__, "client")
