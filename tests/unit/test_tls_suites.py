"""What TLS the endpoint offers: 1.2 with ephemeral keys and AEAD alone, as HTTP/2 wants it (RFC 9113, 9.2), and 1.3."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from gateway.edge.client.certificates import server_context


def _suites() -> dict[str, bool]:
    """What this OpenSSL can do in TLS 1.2, by name, and whether it is ephemeral and AEAD (RFC 9113, Appendix A forbids all others)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("ALL:COMPLEMENTOFALL:@SECLEVEL=0")
    return {one["name"]: one["aead"] and one["kea"] == "kx-ecdhe" for one in context.get_ciphers() if one["protocol"] != "TLSv1.3"}


SUITES = _suites()


def certificate(directory: Path, kind: str) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1()) if kind == "ec" else rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256())
    )  # fmt: skip
    (directory / "crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (directory / "key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return directory / "crt", directory / "key"


@pytest.fixture(scope="module", params=["ec", "rsa"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    return server_context(*certificate(tmp_path_factory.mktemp("tls"), request.param))


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> ssl.SSLObject:
    """Raises ssl.SSLError where the two do not agree."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server)
    waiting = [theirs, ours]
    for _ in range(4):  # round trips
        for one in list(waiting):
            try:
                one.do_handshake()
                waiting.remove(one)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    return theirs


def client_context(suite: str, most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = most
    context.set_ciphers(f"{suite}:@SECLEVEL=0")
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


@pytest.mark.parametrize("suite", sorted(name for name, good in SUITES.items() if not good))
def test_a_suite_without_ephemeral_keys_or_aead_is_refused(server: ssl.SSLContext, suite: str) -> None:
    with pytest.raises(ssl.SSLError):
        handshake(server, client_context(suite))


@pytest.mark.parametrize("suite", ["AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305"])
def test_the_usual_suites_of_tls_1_2_are_there_and_speak_http2(server: ssl.SSLContext, suite: str) -> None:
    agreed = handshake(server, client_context(f"ECDHE-ECDSA-{suite}:ECDHE-RSA-{suite}"))
    cipher = agreed.cipher()
    assert cipher is not None and suite in cipher[0] and agreed.selected_alpn_protocol() == "h2"


def test_tls_1_3_is_preferred_and_what_is_older_than_1_2_refused(server: ssl.SSLContext) -> None:
    assert handshake(server, client_context("ALL", ssl.TLSVersion.TLSv1_3)).version() == "TLSv1.3"
    old = client_context("ALL", ssl.TLSVersion.TLSv1_2)
    with pytest.warns(DeprecationWarning):
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        handshake(server, old)


def test_no_renegotiation_and_no_compression(server: ssl.SSLContext) -> None:
    assert server.options & ssl.OP_NO_RENEGOTIATION and server.options & ssl.OP_NO_COMPRESSION
    assert handshake(server, client_context("ALL")).compression() is None
