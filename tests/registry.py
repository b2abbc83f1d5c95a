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
from namespaces import namespace

ADDRESS = "198.51.100.9"  # TEST-NET-2, behind a router: a host's own addresses and networks are closed to builds
_DEVICE, _OURS, _ROUTER = "torpor-test0", "192.0.2.5", "192.0.2.6"  # TEST-NET-1
_INDEX = "application/vnd.oci.image.index.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class Registry(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, password: str, address: str = ADDRESS, handler: type[http.server.BaseHTTPRequestHandler] | None = None) -> None:
        super().__init__((address, 0), handler or _Pull)
        self.host = f"{address}:{self.server_port}"
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
        self.put_layers(name, [("application/vnd.oci.image.layer.v1.tar", out.getvalue())])

    def put_layers(self, name: str, layers: list[tuple[str, bytes]], architecture: str = "amd64") -> dict[str, object]:
        """An image of tar archives, each with its media type; returns its descriptor."""
        blobs = [self._blob(kind, data) for kind, data in layers]
        config = {
            "architecture": architecture,
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [blob["digest"] for blob in blobs]},
            "config": {},
            "history": [{} for _ in blobs],
        }
        manifest = {
            "schemaVersion": 2, "mediaType": _MANIFEST, "layers": blobs,
            "config": self._blob("application/vnd.oci.image.config.v1+json", json.dumps(config).encode()),
        }  # fmt: skip
        self.manifests[name] = json.dumps(manifest).encode()
        digest = f"sha256:{hashlib.sha256(self.manifests[name]).hexdigest()}"
        self.manifests[f"{name.partition(':')[0]}:{digest}"] = self.manifests[name]
        platform = {"os": "linux", "architecture": architecture}
        return {"mediaType": _MANIFEST, "digest": digest, "size": len(self.manifests[name]), "platform": platform}

    def put_index(self, name: str, images: list[dict[str, object]]) -> None:
        """An image of several architectures."""
        self.manifests[name] = json.dumps({"schemaVersion": 2, "mediaType": _INDEX, "manifests": images}).encode()

    def _blob(self, kind: str, data: bytes) -> dict[str, object]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        return {"mediaType": kind, "digest": digest, "size": len(data)}


class _Pull(http.server.BaseHTTPRequestHandler):
    server: Registry
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.headers.get("Authorization") == f"Basic {self.server.login}":
            self._serve()
            return
        self.server.refused += 1
        self._reply(401, b"{}", "application/json", ("WWW-Authenticate", 'Basic realm="registry"'))

    def _serve(self) -> None:
        _, _, path = self.path.partition("/v2/")
        name, _, reference = path.rpartition("/")
        if not path:
            self._reply(200, b"{}", "application/json")
        elif name.endswith("/manifests") and f"{name.removesuffix('/manifests')}:{reference}" in self.server.manifests:
            if self.command == "GET":
                self.server.pulled.append(name.removesuffix("/manifests"))
            data = self.server.manifests[f"{name.removesuffix('/manifests')}:{reference}"]
            self._reply(200, data, json.loads(data)["mediaType"])
        elif name.endswith("/blobs") and reference in self.server.blobs:
            self._reply(200, self.server.blobs[reference], "application/octet-stream")
        else:
            self._reply(404, b"{}", "application/json")

    def _reply(self, status: int, body: bytes, kind: str, *more: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), *more):
            self.send_header(name, value)
        if status == 200 and body:
            self.send_header("Docker-Content-Digest", f"sha256:{hashlib.sha256(body).hexdigest()}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Public(Registry):
    """A registry on loopback that gives anybody a token, and keeps its layers on another of its paths (as ECR Public and Docker Hub do)."""

    def __init__(self) -> None:
        super().__init__("", "127.0.0.1", _PublicPull)
        self.tokens_seen_elsewhere = 0


class _PublicPull(_Pull):
    server: Public

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/token":
            self._reply(200 if "scope=repository" in query else 400, json.dumps({"token": "anybody"}).encode(), "application/json")
        elif path.startswith("/elsewhere/"):
            self.server.tokens_seen_elsewhere += "Authorization" in self.headers
            self._reply(200, self.server.blobs[path.removeprefix("/elsewhere/")], "application/octet-stream")
        elif self.headers.get("Authorization") != "Bearer anybody":
            self.server.refused += 1
            challenge = f'Bearer realm="https://{self.server.host}/token",service="registry",scope="repository:x:pull"'
            self._reply(401, b"{}", "application/json", ("WWW-Authenticate", challenge))
        elif "/blobs/" in path and path.rpartition("/")[2] in self.server.blobs:
            self._reply(
                307, b"", "text/plain", ("Location", f"https://localhost:{self.server.server_port}/elsewhere/{path.rpartition('/')[2]}")
            )
        else:
            self._serve()


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


def certificate(directory: Path, address: str = ADDRESS) -> tuple[Path, Path]:
    """One for an address, and localhost, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "registry")]), datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address)), x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    path, key_path = directory / "registry.crt", directory / "registry.key"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return path, key_path


@contextlib.contextmanager
def served(directory: Path, password: str) -> Iterator[tuple[Registry, Path]]:
    """The registry, and the certificate that its clients must trust."""
    with namespace() as beyond:
        _ip("link", "add", _DEVICE, "type", "veth", "peer", "name", "lan0", "netns", beyond.path)
        try:
            _ip("addr", "add", f"{_OURS}/30", "dev", _DEVICE)
            _ip("link", "set", _DEVICE, "up")
            _ip("route", "add", f"{ADDRESS}/32", "via", _ROUTER)
            beyond.ip("addr", "add", f"{_ROUTER}/30", "dev", "lan0")
            beyond.ip("link", "set", "lan0", "up")
            beyond.ip("addr", "add", f"{ADDRESS}/32", "dev", "lo")
            registry = beyond.inside(lambda: Registry(password))
            trusted = encrypted(registry, directory, ADDRESS)
            with running(registry):
                yield registry, trusted
        finally:
            _ip("link", "del", _DEVICE)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def encrypted(server: http.server.HTTPServer, directory: Path, address: str) -> Path:
    """Has a server speak TLS; returns the certificate that its clients must trust."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    path, key = certificate(directory, address)
    context.load_cert_chain(path, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return path


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
