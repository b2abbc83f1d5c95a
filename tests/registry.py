"""A registry of container images with a login (OCI distribution-spec), and an ECR that gives it, on one address of this host."""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import http.server
import io
import ipaddress
import json
import ssl
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ADDRESS = "198.51.100.9"  # TEST-NET-2; loopback's own addresses are closed to builds
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class Registry(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, password: str) -> None:
        super().__init__((ADDRESS, 0), _Pull)
        self.host = f"{ADDRESS}:{self.server_port}"
        self.login = base64.b64encode(f"AWS:{password}".encode()).decode()
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.pulled: list[str] = []
        self.refused = 0

    def put(self, name: str, files: dict[str, bytes]) -> None:
        """An image of one layer, all files executable."""
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for path, data in files.items():
                info = tarfile.TarInfo(path)
                info.size, info.mode = len(data), 0o755
                archive.addfile(info, io.BytesIO(data))
        layer = self._blob("application/vnd.oci.image.layer.v1.tar", out.getvalue())
        config = {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
            "config": {},
            "history": [{}],
        }
        manifest = {
            "schemaVersion": 2, "mediaType": _MANIFEST, "layers": [layer],
            "config": self._blob("application/vnd.oci.image.config.v1+json", json.dumps(config).encode()),
        }  # fmt: skip
        self.manifests[name] = json.dumps(manifest).encode()

    def _blob(self, kind: str, data: bytes) -> dict[str, object]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        return {"mediaType": kind, "digest": digest, "size": len(data)}


class _Pull(http.server.BaseHTTPRequestHandler):
    server: Registry
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Basic {self.server.login}":
            self.server.refused += 1
            self._reply(401, b"{}", "application/json", ("WWW-Authenticate", 'Basic realm="registry"'))
            return
        _, _, path = self.path.partition("/v2/")
        name, _, reference = path.rpartition("/")
        if not path:
            self._reply(200, b"{}", "application/json")
        elif name.endswith("/manifests") and f"{name.removesuffix('/manifests')}:{reference}" in self.server.manifests:
            self.server.pulled.append(name.removesuffix("/manifests"))
            self._reply(200, self.server.manifests[f"{name.removesuffix('/manifests')}:{reference}"], _MANIFEST)
        elif name.endswith("/blobs") and reference in self.server.blobs:
            self._reply(200, self.server.blobs[reference], "application/octet-stream")
        else:
            self._reply(404, b"{}", "application/json")

    def _reply(self, status: int, body: bytes, kind: str, *more: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), *more):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Ecr(http.server.ThreadingHTTPServer):
    """GetAuthorizationToken for signed requests with session credentials; `asked` keeps their access keys."""

    daemon_threads = True

    def __init__(self, registry: Registry) -> None:
        super().__init__(("127.0.0.1", 0), _Grant)
        self.registry = registry
        self.asked: list[str] = []
        self.open = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Grant(http.server.BaseHTTPRequestHandler):
    server: Ecr

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.headers["Authorization"].partition("Credential=")[2].partition("/")[0])
        granted = self.server.open and self.headers["X-Amz-Security-Token"]
        registry = self.server.registry
        body = {"authorizationData": [{"authorizationToken": registry.login, "proxyEndpoint": f"https://{registry.host}"}]}
        data = json.dumps(body if granted else {"__type": "AccessDeniedException", "message": "not authorized"}).encode()
        self.send_response(200 if granted else 400)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def certificate(directory: Path) -> tuple[Path, Path]:
    """One for ADDRESS, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "registry")]), datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(ADDRESS))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    path, key_path = directory / "registry.crt", directory / "registry.key"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return path, key_path


@contextlib.contextmanager
def served(directory: Path, password: str) -> Iterator[tuple[Registry, Path]]:
    """The registry, and the certificate that its clients must trust."""
    subprocess.run(["ip", "addr", "add", f"{ADDRESS}/32", "dev", "lo"], check=True, capture_output=True)
    try:
        registry = Registry(password)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        path, key = certificate(directory)
        context.load_cert_chain(path, key)
        registry.socket = context.wrap_socket(registry.socket, server_side=True)
        with running(registry):
            yield registry, path
    finally:
        subprocess.run(["ip", "addr", "del", f"{ADDRESS}/32", "dev", "lo"], check=True, capture_output=True)


@contextlib.contextmanager
def running(server: http.server.HTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
