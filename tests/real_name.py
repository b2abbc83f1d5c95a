"""The API under the name that the real service has, for clients that take no endpoint: in a network namespace of its own, by TLS."""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from namespaces import Namespace
from outside import bound

NAME = "lambda.us-east-1.amazonaws.com"


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey, is_ca: bool
) -> x509.Certificate:
    def common(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder().subject_name(common(name)).issuer_name(common(issuer)).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(signer, hashes.SHA256())
    )  # fmt: skip


def _pour(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for sock in (source, target):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()


class RealName:
    """`run` runs a command to which the API at `port` is the real service."""

    def __init__(self, directory: Path, port: int) -> None:
        self._directory, self._port = directory, port
        authority, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        (directory / "ca.pem").write_bytes(_certificate("test", authority, "test", authority, True).public_bytes(Encoding.PEM))
        chain = _certificate(NAME, leaf, "test", authority, False).public_bytes(Encoding.PEM)
        key = leaf.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (directory / "leaf.pem").write_bytes(chain + key)
        (directory / "hosts").write_text(f"127.0.0.1 localhost {NAME}\n")
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(directory / "leaf.pem")

    def start(self) -> None:
        self._namespace = Namespace()
        self._listener = self._namespace.inside(lambda: bound(socket.SOCK_STREAM, ("127.0.0.1", 443)))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):
                outer = self._context.wrap_socket(client, server_side=True)
                inner = socket.create_connection(("127.0.0.1", self._port))
                for pair in ((outer, inner), (inner, outer)):
                    threading.Thread(target=_pour, args=pair, daemon=True).start()

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        enter = self._namespace.enter("unshare", "--mount", "sh", "-c", 'mount --bind "$1" /etc/hosts; shift; exec "$@"', "sh")
        enter.append(f"{self._directory}/hosts")
        names = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self._directory), "SSL_CERT_FILE": str(self._directory / "ca.pem")}
        return subprocess.run([*enter, *command], env=names | environment, capture_output=True, text=True, timeout=60, check=False)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)
        self._namespace.close()


@contextlib.contextmanager
def real_name(directory: Path, port: int) -> Iterator[RealName]:
    one = RealName(directory, port)
    one.start()
    try:
        yield one
    finally:
        one.stop()
