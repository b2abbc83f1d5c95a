"""What is written down of a request that has ended, and of a fault that an application made."""

from gateway.edge import native

native.lead(__path__, "records")
