"""The side towards applications: their connections, the pool that owns them, and how they are made."""

from gateway.edge import native

native.lead(__path__, "origin")
