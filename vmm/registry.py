"""The announcement's base from its registry: an image for this host's architecture, as one tar archive of its root (OCI distribution-spec).

The registry is asked without a login; where it wants a token, its own service gives one to anybody (RFC 6750; Docker's token protocol).
Every byte is held to the digest that names it. Layers are put over each other by their lists of names, and nothing is unpacked here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import re
import shutil
import ssl
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import zstandard

from .kernel import AssetError

_ASK_SECONDS = 5
_READ_SECONDS = 60
_DOCUMENT_BYTES = 4 << 20
_LAYERS_BYTES = 4 << 30
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_NAME = re.compile(r"(?P<host>[^/]*[.:][^/]*|localhost)/(?P<repository>[^:@]+)(?::(?P<tag>[\w.-]+))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?")
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_CHUNK = 1 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class Reference:
    """A registry's host, a repository, and a tag or a digest."""

    host: str
    repository: str
    version: str

    @classmethod
    def parse(cls, name: str) -> Reference:
        """Raises AssetError for a name without a registry, which is nobody's in particular."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise AssetError(f"{name} names no registry: write HOST/REPOSITORY:TAG")
        return cls(match["host"], match["repository"], match["digest"] or match["tag"] or "latest")


class Registry:
    """Asks one registry about one repository."""

    def __init__(self, reference: Reference, authorities: Path | None = None) -> None:
        context = ssl.create_default_context()
        if authorities is not None:
            context.load_verify_locations(authorities)
        self._open = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context)).open
        self._reference = reference
        self._base = f"https://{reference.host}/v2/{reference.repository}"
        self._token = ""

    def manifest(self) -> tuple[str, dict[str, Any]]:
        """Returns the digest and the content of the manifest for this host's architecture. Raises AssetError."""
        data, kind = self._document(f"manifests/{self._reference.version}", "", _ASK_SECONDS)
        found = json.loads(data)
        if kind not in _INDEXES and "manifests" not in found:
            return f"sha256:{hashlib.sha256(data).hexdigest()}", found
        wanted = _ARCHITECTURES.get(platform.machine(), platform.machine())
        for one in found["manifests"]:
            where = one.get("platform") or {}
            if (where.get("os"), where.get("architecture")) == ("linux", wanted):
                digest = str(one["digest"])
                return digest, json.loads(self._document(f"manifests/{digest}", digest, _READ_SECONDS)[0])
        raise AssetError(f"{self._reference.host}/{self._reference.repository} has no image for linux/{wanted}")

    def blob(self, descriptor: dict[str, Any], target: Path) -> None:
        """Raises AssetError."""
        state, size = hashlib.sha256(), 0
        with self._ask(f"blobs/{descriptor['digest']}", "*/*", _READ_SECONDS) as answer, target.open("wb") as out:
            while chunk := answer.read(_CHUNK):
                state.update(chunk)
                size += len(chunk)
                if size > int(descriptor["size"]):
                    break
                out.write(chunk)
        if f"sha256:{state.hexdigest()}" != descriptor["digest"]:
            raise AssetError(f"{self._reference.host} sent something else for {descriptor['digest']}")

    def _document(self, path: str, digest: str, seconds: int) -> tuple[bytes, str]:
        with self._ask(path, ", ".join((*_INDEXES, *_MANIFESTS)), seconds) as answer:
            data = answer.read(_DOCUMENT_BYTES)
            kind = answer.headers.get_content_type()
        if digest and f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            raise AssetError(f"{self._reference.host} sent something else for {digest}")
        return data, kind

    def _ask(self, path: str, accept: str, seconds: int, is_retried: bool = False) -> Any:
        request = urllib.request.Request(f"{self._base}/{path}", headers={"Accept": accept})
        if self._token:  # not for whom the registry sends us to
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            return self._open(request, timeout=seconds)
        except urllib.error.HTTPError as error:
            if error.code == 401 and not is_retried:
                self._token = self._fetch_token(error.headers, seconds)
                return self._ask(path, accept, seconds, True)
            raise AssetError(f"{self._base}/{path}: {error.code} {error.reason}") from error

    def _fetch_token(self, headers: Message, seconds: int) -> str:
        challenge = headers.get("WWW-Authenticate", "")
        told = dict(_CHALLENGE.findall(challenge))
        if not challenge.lower().startswith("bearer") or not told.get("realm", "").startswith("https://"):
            raise AssetError(f"{self._reference.host} wants a login")
        query = {"scope": told.get("scope") or f"repository:{self._reference.repository}:pull"}
        if "service" in told:
            query["service"] = told["service"]
        with self._open(f"{told['realm']}?{urllib.parse.urlencode(query)}", timeout=seconds) as answer:
            given = json.loads(answer.read(_DOCUMENT_BYTES))
        return str(given.get("token") or given.get("access_token") or "")


def digest(name: str, authorities: Path | None = None) -> str:
    """Returns the digest of the image that a name has now, for this host. Raises AssetError where no registry answers within seconds."""
    return _told(lambda: Registry(Reference.parse(name), authorities).manifest()[0])


def pull(name: str, wanted: str, target: Path, authorities: Path | None = None) -> None:
    """Writes the root of the image with that digest as a tar archive. Raises AssetError."""
    reference = Reference.parse(name)
    registry = Registry(Reference(reference.host, reference.repository, wanted), authorities)

    def work() -> None:
        _, manifest = registry.manifest()
        layers = manifest["layers"]
        if sum(int(layer["size"]) for layer in layers) > _LAYERS_BYTES:
            raise AssetError(f"{name} has more than {_LAYERS_BYTES >> 30} GiB of layers")
        files = []
        for number, layer in enumerate(layers):
            packed, plain = target.with_name(f"layer{number}.packed"), target.with_name(f"layer{number}.tar")
            registry.blob(layer, packed)
            with _unpacked(packed) as source, plain.open("wb") as out:
                shutil.copyfileobj(source, out, _CHUNK)
            packed.unlink()
            files.append(plain)
        flatten(files, target)
        for plain in files:
            plain.unlink()

    _told(work)


def _told(work: Callable[[], T]) -> T:
    """Raises AssetError for whatever the way to a registry, or its answer, was wrong with."""
    try:
        return work()
    except (OSError, HTTPException, ValueError, KeyError, TypeError, tarfile.TarError, zstandard.ZstdError) as error:
        raise AssetError(f"the registry: {error}") from error


def _unpacked(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic[:2] == b"\x1f\x8b":
        return cast(IO[bytes], gzip.open(path))
    if magic == b"\x28\xb5\x2f\xfd":
        return cast(IO[bytes], zstandard.open(path, "rb"))
    return path.open("rb")


def flatten(layers: list[Path], target: Path) -> None:
    """Writes one archive of layers, the lowest first (OCI image-spec, layer.md): what an upper one has or whites out is not taken from
    below."""
    kept: list[set[int]] = []
    copied: list[set[int]] = []  # hard links whose other name an upper layer has taken
    hidden: set[str] = set()  # names that are there above, or whited out
    closed: set[str] = set()  # folders of which nothing from below is seen
    for layer in reversed(layers):
        own, names, shut, copies = set[int](), set[str](), set[str](), set[int]()
        with tarfile.open(layer) as archive:
            for number, member in enumerate(archive):
                name = member.name.strip("/").removeprefix("./")
                folder, _, last = name.rpartition("/")
                if last == _OPAQUE:
                    shut.add(folder)
                elif last.startswith(_WHITEOUT):
                    gone = f"{folder}/{last.removeprefix(_WHITEOUT)}".strip("/")
                    names.add(gone)
                    shut.add(gone)
                elif name not in hidden and not any(above in closed for above in _above(name)):
                    own.add(number)
                    if member.islnk() and member.linkname.removeprefix("./") in hidden:
                        copies.add(number)
                    names.add(name)
                    if not member.isdir():
                        shut.add(name)
        kept.insert(0, own)
        copied.insert(0, copies)
        hidden |= names
        closed |= shut
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as out:
        for layer, own, copies in zip(layers, kept, copied, strict=True):
            with tarfile.open(layer) as archive:
                for number, member in enumerate(archive):
                    if number not in own or member.ischr() or member.isblk():
                        continue
                    data = archive.extractfile(member) if member.isreg() or number in copies else None
                    if number in copies:
                        member.size = archive.getmember(member.linkname).size
                        member.type, member.linkname = tarfile.REGTYPE, ""
                    out.addfile(member, data)


def _above(name: str) -> Iterator[str]:
    """Returns the name, and every folder that it is in."""
    while name:
        yield name
        name = name.rpartition("/")[0]
    yield ""
