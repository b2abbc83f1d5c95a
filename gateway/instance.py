"""An instance's files: directories and their owners, certificates, access keys, and the AWS profile that points at it."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import re
import secrets
import socket
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from . import files
from .config import ConfigError, Settings

log = structlog.get_logger()

_TOKEN_LEAST_BYTES = 16
_WITH_SECRETS = ("object_store", "credentials")  # sections
_TICKETS_SECONDS, _TICKETS_BYTES = 12 * 3600, 80
# What clients are pointed at us for: each answers here, what is not served of it with an error that says so.
SERVED = ("lambda_microvms", "lambda_core", "cloudwatch_logs", "sts", "service_quotas")
# Each family of clients has its own: OpenSSL (Python, Ruby) and Go, requests, aws and boto3, Node, gRPC, git, curl.
_CA_VARIABLES = (
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "GIT_SSL_CAINFO",
    "CURL_CA_BUNDLE",
)  # fmt: skip
IDS = 3 * 65_536  # of the service's processes and hypervisors, from users.first on (gateway/config.py, Users)
BUILD_RANGE = 1 << 20  # of the first account's builds (vmm/build_stores.py)
_CA_DAYS, _LEAF_DAYS, _RENEW_DAYS = 3650, 397, 30


def prepare(settings: Settings) -> Settings:
    """Makes what is missing; returns the settings with what their files of secrets say. Raises ConfigError when the unprivileged processes
    could not reach their files, or are somebody else's too, and for secrets that others may read."""
    check_secrets(settings.root / "torpor.toml")
    settings = with_secrets(settings)
    users = settings.users
    check_ids(settings)
    for path in (settings.root, settings.runtime):
        path.mkdir(parents=True, exist_ok=True)
        check_reachable(path)
        path.chmod(0o711)
    os.chown(settings.runtime, 0, 0)  # an older version made it control's, and with it what root writes and reads there
    for path, owner, mode in (
        (settings.images_dir, 0, 0o700), (settings.sessions_dir, 0, 0o700), (settings.root / "builds", 0, 0o700),
        (settings.control_dir, users.control, 0o700), (settings.tls_dir, 0, 0o755), (settings.aws_dir, 0, 0o700),
        (settings.root / "store", users.store, 0o700), (settings.control_runtime, users.control, 0o711),
    ):  # fmt: skip
        path.mkdir(exist_ok=True)
        os.chown(path, owner, owner)
        path.chmod(mode)
    if settings.edge.access_log:  # its place is the operator's; workers, who are nobody there, only write to it
        log = Path(settings.edge.access_log)
        try:
            log.touch(0o640)
            os.chown(log, users.edge, -1)
        except OSError as error:
            raise ConfigError(f"edge.access_log {log}: {error.strerror}") from error
    make_certificates(settings)
    update_certificates(settings)
    keys = make_access_keys(settings)
    write_aws_profile(settings, *next(iter(keys.items())))
    return settings


def check_secrets(path: Path) -> None:
    """Raises ConfigError for settings with a secret among them that others than their owner may read."""
    try:
        mode = path.stat().st_mode
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ConfigError(f"torpor.toml: {error}") from error
    found = [f"{section}.secret_key" for section in _WITH_SECRETS if given.get(section, {}).get("secret_key")]
    if found and mode & 0o077:
        raise ConfigError(
            f"{path} may be read by others (mode {mode & 0o777:o}) and has {' and '.join(found)} in it: chmod 600 {path}, "
            f"or put the secret into a file of its own ({found[0]}_file)"
        )


def with_secrets(settings: Settings) -> Settings:
    """Returns the settings with the secrets that have files of their own. Raises ConfigError."""
    for name in _WITH_SECRETS:
        section = getattr(settings, name)
        if not section.secret_key_file:
            continue
        if section.secret_key:
            raise ConfigError(f"{name}.secret_key and {name}.secret_key_file: set one of them")
        secret = _secret_of(Path(section.secret_key_file), f"{name}.secret_key_file").decode("utf-8", "replace")
        if not secret:
            raise ConfigError(f"{name}.secret_key_file {section.secret_key_file} is empty")
        settings = settings.model_copy(update={name: section.model_copy(update={"secret_key": secret})})
    return settings


def check_ids(settings: Settings, etc: Path = Path("/etc")) -> None:
    """The service's processes are known to each other by their numeric ids. Whoever else has one of these, by name or as an id that he may
    take in a user namespace (subuid(5)), would be that process. Raises ConfigError."""
    users = settings.users
    ours = {"users.first": (users.first, users.first + IDS), "users.builders": (users.builders, users.builders + BUILD_RANGE)}
    for setting, (first, after) in ours.items():
        for name, low, high in _others(etc):
            if low < after and first < high:
                raise ConfigError(
                    f"{setting}: the ids {first} to {after - 1} are not the service's alone: {name} has {low} to {high - 1}; "
                    f"set {setting} to the first of as many that nobody has, or take them out there"
                )


def _others(etc: Path) -> Iterator[tuple[str, int, int]]:
    """Who has ids on this host: (name and file, first, after the last)."""
    for file in ("passwd", "group"):
        for fields in _fields(etc / file, 3):
            if fields[2].isdigit():
                yield f"{fields[0]} (/etc/{file})", int(fields[2]), int(fields[2]) + 1
    for file in ("subuid", "subgid"):
        for fields in _fields(etc / file, 3):
            if fields[1].isdigit() and fields[2].isdigit():
                yield f"{fields[0]} (/etc/{file})", int(fields[1]), int(fields[1]) + int(fields[2])


def _fields(path: Path, count: int) -> Iterator[list[str]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        if len(fields := line.split(":")) >= count:
            yield fields


def check_reachable(path: Path) -> None:
    """Every directory above must let others pass, because edge and control are nobody there."""
    for parent in (path, *path.resolve().parents):
        if parent != path and not parent.stat().st_mode & 0o001:
            raise ConfigError(f"{path} lies below {parent}, which other users may not enter: choose another --root")


def check_readable(package: Path) -> None:
    """The code, cloned and installed under a umask of 077, would be no other user's to read, wherever it lies."""
    for path in (package.parent, package, package / "__init__.py", Path(sys.prefix), Path(x509.__file__)):
        wanted = 0o005 if path.is_dir() else 0o004
        if path.stat().st_mode & wanted != wanted:
            place = package.parent
            raise ConfigError(f"{path} may not be read by other users, whom the service's processes are: chmod -R go+rX {place}")


def make_access_keys(settings: Settings) -> dict[str, str]:
    path = settings.control_dir / "access-keys.json"
    if not path.exists():
        keys = {"AKIA" + "".join(secrets.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") for _ in range(16)): secrets.token_urlsafe(30)}
        files.write(path, json.dumps(keys).encode(), 0o600, settings.users.control)
    return files.access_keys(path)


def api_url(settings: Settings) -> str:
    """Returns where clients on this host, and those that `api.names` are for, find the API."""
    api = settings.api
    is_any = api.address in ("", "0.0.0.0", "::")
    host = api.names[0] if api.names else "localhost" if is_any and api.tls else "127.0.0.1" if is_any else api.address
    return f"{'https' if api.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{api.port}"


def write_aws_profile(settings: Settings, key: str, secret: str) -> None:
    """`AWS_CONFIG_FILE` and `AWS_SHARED_CREDENTIALS_FILE` of this instance; nobody's own files are touched."""
    api = api_url(settings)
    store = settings.object_store.endpoint or f"http://127.0.0.1:{settings.object_store.port}"
    bundle = f"ca_bundle = {settings.tls_dir / 'bundle.crt'}\n" if settings.api.tls else ""
    ours = "".join(f"{name} =\n  endpoint_url = {api}\n" for name in SERVED)
    config = (
        f"[default]\nregion = {settings.region}\noutput = json\ncli_pager =\n{bundle}s3 =\n  signature_version = s3v4\n"
        f"services = torpor\n\n[services torpor]\n{ours}s3 =\n  endpoint_url = {store}\n"
        f"  addressing_style = {settings.object_store.addressing}\n"
    )
    files.write(settings.aws_dir / "config", config.encode(), 0o600, 0)
    credentials = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    files.write(settings.aws_dir / "credentials", credentials.encode(), 0o600, 0)


def environment(settings: Settings) -> dict[str, str]:
    """Returns the variables that make aws, boto3, curl and torpor, and clients of endpoints in any language, work with this instance."""
    return {
        "AWS_CONFIG_FILE": str(settings.aws_dir / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(settings.aws_dir / "credentials"),
        **dict.fromkeys(_CA_VARIABLES, str(settings.tls_dir / "bundle.crt")),
    }


# ---- certificates ----


def wildcard(settings: Settings) -> str:
    return f"*.lambda-microvm.{settings.region}.{settings.domain}"


def make_certificates(settings: Settings, clock: Callable[[], float] = time.time) -> None:
    """A certificate authority for this instance, and certificates of its own where the settings name none."""
    directory = settings.tls_dir
    ca_path, ca_key_path = directory / "ca.crt", directory / "ca.key"
    if not (ca_path.exists() and ca_key_path.exists()):
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Torpor development CA ({settings.name})")])
        certificate = _builder(name, name, key.public_key(), _CA_DAYS, _moment(clock)).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        ).add_extension(
            x509.KeyUsage(True, False, False, False, False, True, True, False, False), critical=True
        ).add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        ).sign(key, hashes.SHA256())  # fmt: skip
        files.write(ca_key_path, _private(key), 0o600, 0)
        files.write(ca_path, certificate.public_bytes(serialization.Encoding.PEM), 0o644, 0)
    for leaf in _leaves(settings):
        if _is_due(leaf, _moment(clock)):
            _make_leaf(leaf, directory, _moment(clock))
    # For clients that take one bundle only: the system's authorities and ours.
    system = Path("/etc/ssl/certs/ca-certificates.crt")
    files.write(directory / "bundle.crt", (system.read_bytes() if system.exists() else b"") + ca_path.read_bytes(), 0o644, 0)


def api_names(settings: Settings) -> list[str]:
    """Returns what the API's own certificate is for."""
    api = settings.api
    named = [*api.names, *([socket.gethostname()] if api.address in ("", "0.0.0.0", "::") else [api.address])]
    return list(dict.fromkeys([*named, "localhost", "127.0.0.1", "::1"]))


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


class _Leaf(NamedTuple):
    """A certificate of our own: `place`.crt and .key."""

    place: Path
    names: list[str]
    owner: int


def _leaves(settings: Settings) -> Iterator[_Leaf]:
    if not settings.edge.certificate:
        yield _Leaf(settings.tls_dir / "edge", [wildcard(settings)], settings.users.edge)
    if settings.api.tls and not settings.api.certificate:
        yield _Leaf(settings.tls_dir / "api", api_names(settings), settings.users.control)


def _moment(clock: Callable[[], float]) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(clock(), datetime.UTC)


def _is_due(leaf: _Leaf, now: datetime.datetime) -> bool:
    """Says whether it is not there, cut off, old, for other names, or half of it another's: a power cut came between the two files."""
    path, key_path = leaf.place.with_suffix(".crt"), leaf.place.with_suffix(".key")
    if not (path.exists() and key_path.exists()):
        return True
    try:
        known = x509.load_pem_x509_certificate(path.read_bytes())
        key = serialization.load_pem_private_key(key_path.read_bytes(), None)
    except ValueError:
        return True
    alternatives = known.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if (known.not_valid_after_utc - now).days <= _RENEW_DAYS or list(alternatives) != [_general_name(name) for name in leaf.names]:
        return True
    return known.public_key() != key.public_key()


def _make_leaf(leaf: _Leaf, directory: Path, now: datetime.datetime) -> None:
    ca = x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())
    ca_key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, leaf.names[0][:64])])
    certificate = _builder(subject, ca.subject, key.public_key(), _LEAF_DAYS, now).add_extension(
        x509.SubjectAlternativeName([_general_name(name) for name in leaf.names]), critical=False
    ).add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
    ).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
    ).sign(ca_key, hashes.SHA256())  # fmt: skip
    files.write(leaf.place.with_suffix(".key"), _private(key), 0o600, leaf.owner)
    files.write(leaf.place.with_suffix(".crt"), certificate.public_bytes(serialization.Encoding.PEM), 0o644, 0)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int, now: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=days))
    )  # fmt: skip


def update_certificates(settings: Settings, clock: Callable[[], float] = time.time) -> None:
    """Copies what the settings name to where workers read it, where it is another; a new ticket key when the old one is old, and
    certificates of our own by the authority that is there.

    Raises ConfigError for a certificate and key that do not belong together.
    """
    directory, edge, api = settings.tls_dir, settings.edge, settings.api
    if bool(edge.certificate) != bool(edge.key):
        raise ConfigError("edge.certificate and edge.key go together: set both, or neither")
    for name, one, owner in (("edge", edge, settings.users.edge), ("api", api, settings.users.control)):
        if one.certificate:
            _copy_pair(name, one.certificate, one.key, directory, owner)
    if api.metrics_token_file:
        token = metrics_token(Path(api.metrics_token_file))
        if not _is_same(settings.metrics_token, token):
            files.write(settings.metrics_token, token, 0o600, settings.users.control)
    else:
        settings.metrics_token.unlink(missing_ok=True)
    if edge.ocsp and not _is_same(directory / "edge.ocsp", answer := Path(edge.ocsp).read_bytes()):
        files.write(directory / "edge.ocsp", answer, 0o644, settings.users.edge)
    tickets = directory / "tickets.key"
    known = tickets.stat() if tickets.exists() else None
    if known is None or known.st_size != _TICKETS_BYTES or time.time() - known.st_mtime > _TICKETS_SECONDS:
        files.write(tickets, secrets.token_bytes(_TICKETS_BYTES), 0o600, settings.users.edge)
    for leaf in _leaves(settings):
        if leaf.place.with_suffix(".crt").exists() and _is_due(leaf, _moment(clock)):
            _make_leaf(leaf, directory, _moment(clock))
            log.info("tls.renewed", certificate=leaf.place.name)


def _copy_pair(name: str, certificate: str, private: str, directory: Path, owner: int) -> None:
    chain, key = Path(certificate).read_bytes(), Path(private).read_bytes()
    if not _is_same(directory / f"{name}.crt", chain) or not _is_same(directory / f"{name}.key", key):
        _check_pair(name, certificate, chain, key)
        files.write(directory / f"{name}.key", key, 0o600, owner)
        files.write(directory / f"{name}.crt", chain, 0o644, owner)


def metrics_token(path: Path) -> bytes:
    """Raises ConfigError for a file that others may read, or that holds no token."""
    token = _secret_of(path, "api.metrics_token_file")
    if len(token) < _TOKEN_LEAST_BYTES or not re.fullmatch(rb"[A-Za-z0-9._~+/=-]+", token):
        raise ConfigError(f"api.metrics_token_file {path}: a token is one line of {_TOKEN_LEAST_BYTES} letters and digits at least")
    return token


def _secret_of(path: Path, setting: str) -> bytes:
    """Returns what a file's only line says, which its owner alone may read. Raises ConfigError."""
    try:
        mode = path.stat().st_mode
        text = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{setting} {path}: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(f"{setting} {path} may be read by others (mode {mode & 0o777:o}): chmod 600 {path}")
    return text


def _is_same(path: Path, data: bytes) -> bool:
    return path.exists() and path.read_bytes() == data


def _check_pair(section: str, name: str, chain: bytes, key: bytes) -> None:
    try:
        certificate = x509.load_pem_x509_certificates(chain)[0]
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, IndexError, TypeError) as error:
        raise ConfigError(f"{section}.certificate {name}: not a PEM certificate with an unencrypted PEM key: {error}") from error
    if certificate.public_key() != private.public_key():
        raise ConfigError(f"{section}.certificate {name} is not the certificate of {section}.key")


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
