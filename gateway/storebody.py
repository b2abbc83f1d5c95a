"""What the guard of the embedded object store reads of a request's body, before moto has it."""

from __future__ import annotations

import hashlib
import io
import re
import tempfile
from collections.abc import Iterator
from typing import IO, Any, Final
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from werkzeug.exceptions import ClientDisconnected
from werkzeug.wsgi import get_input_stream

from . import storechunks
from .api.errors import ApiError

_KEYS, _KEY_BYTES, _LIST_BYTES = 1000, 1024, 2 << 20  # of one DeleteObjects: the first two are S3's
_PART, _IN_MEMORY = 1 << 20, 16 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_UNSIGNED: Final = ("UNSIGNED-PAYLOAD", "STREAMING-UNSIGNED-PAYLOAD-TRAILER")
_AS_READ: Final = {"\r": "&#13;"}


class BodyRefused(ApiError):
    def __init__(self, kind: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status


class _Plain(ElementTree.TreeBuilder):
    """Takes no document type, and so no entities, which grow and read files."""

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise _malformed()


def room() -> IO[bytes]:
    """Returns where `hold` puts a body: large ones into a file, as moto does with its objects."""
    return tempfile.SpooledTemporaryFile(_IN_MEMORY)


def check_form(said: str | None, is_query_form: bool) -> None:
    """`said`: what the request says that its body's hash is (x-amz-content-sha256). Raises BodyRefused."""
    if said is None and not is_query_form:
        raise BodyRefused("InvalidRequest", "Missing required header for this request: x-amz-content-sha256")
    if said is None or said in (*_UNSIGNED, storechunks.FORM) or _DIGEST.fullmatch(said):
        return
    if said.startswith("STREAMING-"):
        text = f"{said[:80]} is not taken: sign the body's hash, or send UNSIGNED-PAYLOAD as x-amz-content-sha256."
        raise BodyRefused("NotImplemented", text, 501)
    raise BodyRefused("InvalidArgument", f"x-amz-content-sha256 must be {', '.join(_UNSIGNED)} or a valid sha256 value.")


def hold(environ: dict[str, Any], said: str | None, chain: storechunks.Chain, room: IO[bytes]) -> None:
    """Gives moto the body out of `room`, once it is known to be the one that was signed. Raises BodyRefused."""
    if said is None or said in _UNSIGNED:
        return
    is_in_chunks = said == storechunks.FORM
    found = hashlib.sha256()
    for part in _parts(environ, chain if is_in_chunks else None):
        found.update(part)
        room.write(part)
    length = room.tell()
    if is_in_chunks:
        _take_apart(environ, length)
    elif found.hexdigest() != said:
        raise _other_hash()
    room.seek(0)
    _replace(environ, room, length)


def _take_apart(environ: dict[str, Any], length: int) -> None:
    """moto gets the body without its chunks, and is not told of any. Raises BodyRefused."""
    if environ.get("HTTP_X_AMZ_DECODED_CONTENT_LENGTH") != str(length):
        raise BodyRefused("IncompleteBody", "The chunks have not as many bytes as x-amz-decoded-content-length says.")
    environ["HTTP_X_AMZ_CONTENT_SHA256"] = _UNSIGNED[0]
    codings = [one.strip() for one in str(environ.pop("HTTP_CONTENT_ENCODING", "")).split(",")]
    if kept := ",".join(one for one in codings if one and one != "aws-chunked"):
        environ["HTTP_CONTENT_ENCODING"] = kept


def removals(environ: dict[str, Any], said: str | None) -> list[tuple[str, str]]:
    """Returns the keys and versions ("" for none) that DeleteObjects names. moto gets them written anew: it can read nothing else than
    what was judged, neither in the XML nor in a form. Raises BodyRefused."""
    if said is not None and said.startswith("STREAMING-"):
        raise BodyRefused("InvalidRequest", "The keys to remove must be sent whole, and not in chunks.")
    found, is_quiet = _read(_list(environ, said))
    written = "".join(
        f"<Object><Key>{escape(key, _AS_READ)}</Key>{f'<VersionId>{escape(version, _AS_READ)}</VersionId>' if version else ''}</Object>"
        for key, version in found
    )
    body = f"<Delete>{'<Quiet>true</Quiet>' if is_quiet else ''}{written}</Delete>".encode()
    _replace(environ, io.BytesIO(body), len(body))
    environ["CONTENT_TYPE"] = "application/xml"
    return found


def _list(environ: dict[str, Any], said: str | None) -> bytes:
    body = b""
    for part in _parts(environ):
        body += part
        if len(body) > _LIST_BYTES:
            raise BodyRefused("MaxMessageLengthExceeded", f"A list of keys to remove has at most {_LIST_BYTES} bytes.")
    if said is not None and said not in _UNSIGNED and hashlib.sha256(body).hexdigest() != said:
        raise _other_hash()
    return body


def _parts(environ: dict[str, Any], chain: storechunks.Chain | None = None) -> Iterator[bytes]:
    stream = get_input_stream(environ)
    try:
        if chain is not None:
            yield from chain.read(stream)
            return
        while part := stream.read(_PART):
            yield part
    except storechunks.ChunkRefused as error:
        raise BodyRefused(error.kind, str(error), error.status) from None
    except (ClientDisconnected, OSError):
        raise BodyRefused("IncompleteBody", "The request's body ended too early.") from None


def _replace(environ: dict[str, Any], body: IO[bytes], length: int) -> None:
    environ |= {"wsgi.input": body, "CONTENT_LENGTH": str(length)}
    environ.pop("HTTP_TRANSFER_ENCODING", None)


def _read(body: bytes) -> tuple[list[tuple[str, str]], bool]:
    try:
        root = ElementTree.fromstring(body, ElementTree.XMLParser(target=_Plain()))
    except (ElementTree.ParseError, ValueError, LookupError):
        raise _malformed() from None
    found, is_quiet = [], False
    if _name(root) != "Delete":
        raise _malformed()
    for one in root:
        if _name(one) == "Quiet":
            is_quiet = one.text == "true"
            continue
        fields = {_name(field): field.text or "" for field in one if not len(field)}
        key = fields.get("Key", "")
        if _name(one) != "Object" or len(fields) != len(one) or not key:
            raise _malformed()
        if len(key.encode()) > _KEY_BYTES:
            raise BodyRefused("KeyTooLongError", "Your key is too long")
        found.append((key, fields.get("VersionId", "")))
    if not 0 < len(found) <= _KEYS:
        raise _malformed()
    return found, is_quiet


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _malformed() -> BodyRefused:
    text = "The XML you provided was not well-formed or did not validate against our published schema"
    return BodyRefused("MalformedXML", text)


def _other_hash() -> BodyRefused:
    return BodyRefused("XAmzContentSHA256Mismatch", "The provided 'x-amz-content-sha256' header does not match what was computed.")
