"""The endpoint's TLS: certificate, stapled OCSP answer and session ticket key, loaded again when their files change.

Python's ssl module has no call for tickets' keys and for stapling, so OpenSSL's own functions are called on the context
(SSL_CTX_set_tlsext_ticket_keys, SSL_CTX_set_tlsext_status_cb). Workers share one ticket key, so that a session resumes at
any of them; it changes with its file, and sessions of the old one then make a full handshake.
"""

from __future__ import annotations

import _ssl
import contextlib
import ctypes
import ssl
from pathlib import Path

import structlog

from gateway import suites

log = structlog.get_logger()

TICKET_KEY_BYTES = 80  # name, HMAC key and AES-256 key, as OpenSSL 3 takes them
_SET_TICKET_KEYS, _SET_STATUS_CB, _SET_STATUS_RESPONSE = 59, 63, 71
_OK, _NOACK = 0, 3
_STATUS_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_OBJECT_HEAD_BYTES = object.__basicsize__  # the SSL_CTX pointer is the first thing in Python's object after it


class Certificates:
    """`context` is the current one; `refresh` looks whether the files are others now."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: tuple[tuple[int, int], ...] = ()
        self._stapled: object = None  # keeps the callback alive
        self.context = self._load()

    @property
    def _files(self) -> list[Path]:
        return [self._directory / name for name in ("edge.crt", "edge.key", "edge.ocsp", "tickets.key")]

    def _stamps(self) -> tuple[tuple[int, int], ...]:
        stamps = []
        for path in self._files:
            try:
                status = path.stat()
                stamps.append((status.st_ino, status.st_mtime_ns))
            except OSError:
                stamps.append((0, 0))
        return tuple(stamps)

    def _load(self) -> ssl.SSLContext:
        """Makes a context of the files. Raises ssl.SSLError, OSError."""
        certificate, key, ocsp, tickets = self._files
        stamps = self._stamps()
        context = server_context(certificate, key)
        if tickets.exists():
            _set_ticket_key(context, tickets.read_bytes())
        stapled = _staple(context, ocsp.read_bytes()) if ocsp.exists() else None
        self._seen, self._stapled = stamps, (self._stapled, stapled)  # connections of the old context may still ask for it
        return context

    def refresh(self) -> bool:
        """Whether there is a new context. A certificate that cannot be loaded leaves the old one in use."""
        stamps = self._stamps()
        if stamps == self._seen:
            return False
        try:
            self.context = self._load()
        except (ssl.SSLError, OSError) as error:
            self._seen = stamps
            log.error("tls.not_loaded", directory=str(self._directory), error=str(error))
            return False
        log.info("tls.loaded", directory=str(self._directory))
        return True


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 and 1.3; HTTP/2 where the client can."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(suites.TLS12)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    with contextlib.suppress(AttributeError):
        context.num_tickets = 1
    return context


def _openssl() -> ctypes.CDLL:
    """The library that Python's ssl module itself uses."""
    library = ctypes.CDLL(_ssl.__file__)
    library.SSL_CTX_ctrl.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_void_p]
    library.SSL_CTX_ctrl.restype = ctypes.c_long
    library.SSL_CTX_callback_ctrl.argtypes = [ctypes.c_void_p, ctypes.c_int, _STATUS_CALLBACK]
    library.SSL_CTX_callback_ctrl.restype = ctypes.c_long
    library.SSL_ctrl.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_void_p]
    library.SSL_ctrl.restype = ctypes.c_long
    library.CRYPTO_malloc.argtypes = [ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int]
    library.CRYPTO_malloc.restype = ctypes.c_void_p
    return library


def _pointer(context: ssl.SSLContext) -> int:
    pointer = ctypes.c_void_p.from_address(id(context) + _OBJECT_HEAD_BYTES).value
    assert pointer is not None
    return pointer


def _set_ticket_key(context: ssl.SSLContext, key: bytes) -> None:
    if len(key) != TICKET_KEY_BYTES or _openssl().SSL_CTX_ctrl(_pointer(context), _SET_TICKET_KEYS, len(key), key) != 1:
        raise ssl.SSLError("the session ticket key was not accepted")


def _staple(context: ssl.SSLContext, answer: bytes) -> object:
    """Sends this OCSP answer (DER) to clients that ask for one; what is returned must live as long as the context."""
    library = _openssl()

    def status(connection: int, _: int) -> int:
        copy = library.CRYPTO_malloc(len(answer), None, 0)  # OpenSSL frees it
        if not copy:
            return _NOACK
        ctypes.memmove(copy, answer, len(answer))
        library.SSL_ctrl(connection, _SET_STATUS_RESPONSE, len(answer), copy)
        return _OK

    callback = _STATUS_CALLBACK(status)
    library.SSL_CTX_callback_ctrl(_pointer(context), _SET_STATUS_CB, callback)
    return callback
