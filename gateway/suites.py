"""The suites of TLS 1.2 that our servers offer, endpoints and API alike."""

from __future__ import annotations

from typing import Final

# Ephemeral keys and AEAD only, because HTTP/2 is spoken over nothing else (RFC 9113, 9.2.2 and Appendix A). A list, not exceptions from
# one: OpenSSL's own lists have suites that are neither.
TLS12: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
