"""What the guard of the embedded object store reads of a request's body, before moto has it."""

from __future__ import annotations

import io
from typing import Any, Final
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from werkzeug.exceptions import ClientDisconnected
from werkzeug.wsgi import get_input_stream

from .api.errors import ApiError

_KEYS, _KEY_BYTES, _LIST_BYTES = 1000, 1024, 2 << 20  # of one DeleteObjects: the first two are S3's
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


def removals(environ: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the keys and versions ("" for none) that DeleteObjects names. moto gets them written anew: it can read nothing else than
    what was judged, neither in the XML nor in a form. Raises BodyRefused."""
    if str(environ.get("HTTP_X_AMZ_CONTENT_SHA256", "")).startswith("STREAMING-"):
        raise BodyRefused("InvalidRequest", "The keys to remove must be sent whole, and not in chunks.")
    found, is_quiet = _read(_list(environ))
    written = "".join(
        f"<Object><Key>{escape(key, _AS_READ)}</Key>{f'<VersionId>{escape(version, _AS_READ)}</VersionId>' if version else ''}</Object>"
        for key, version in found
    )
    body = f"<Delete>{'<Quiet>true</Quiet>' if is_quiet else ''}{written}</Delete>".encode()
    environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": "application/xml"}
    environ.pop("HTTP_TRANSFER_ENCODING", None)
    return found


def _list(environ: dict[str, Any]) -> bytes:
    try:
        body = get_input_stream(environ).read(_LIST_BYTES + 1)
    except (ClientDisconnected, OSError):
        raise BodyRefused("IncompleteBody", "The request's body ended too early.") from None
    if len(body) > _LIST_BYTES:
        raise BodyRefused("MaxMessageLengthExceeded", f"A list of keys to remove has at most {_LIST_BYTES} bytes.")
    return body


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
