"""What a request may do, as values: admission, routes, holds, limits, fairness, what is remembered, and our own answers."""

from gateway.edge import native

native.lead(__path__, "policy")
