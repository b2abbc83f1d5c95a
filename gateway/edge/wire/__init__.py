"""What octets mean: HTTP/1 and HTTP/2 messages, frames, flow control, WebSocket frame heads."""

from gateway.edge import native

native.lead(__path__, "wire")
