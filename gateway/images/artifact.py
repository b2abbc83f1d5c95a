"""Artifacts: fetched from S3 to a file, unpacked by an unprivileged process, their Dockerfile looked at."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import msgspec
import structlog
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from gateway import confine, executors
from gateway.accounts.directory import Credentials
from gateway.config import Settings

log = structlog.get_logger()

_URI = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/([^\x00-\x1f]+?)(?:\?versionId=([^\s?&]+))?")
_NO_TEXT = re.compile("[\ud800-\udfff]")
_UNPACK_SECONDS = 180
_TOLD_BYTES = 64 << 10  # that the unpacker may say: a line, which may name an entry
_CHUNK = 1 << 20
_ENVIRONMENT = ("PATH", "LANG", "TZ", "HOME", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")  # without credentials
_FETCH_SECONDS, _FETCH_BYTES_PER_SECOND = 120, 256 << 10  # and so many seconds more for each that came


def as_text(words: str) -> str:
    """Returns what can be stored and answered of words that may quote bytes of a file: those that are no UTF-8 (PEP 383) are replaced."""
    return _NO_TEXT.sub("\ufffd", words)


class BuildFailed(Exception):
    """A build ends here; `code` and text are what its stateReason says."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(as_text(f"{code}: {text}" if code else text))
        self.code = code


def parse_uri(uri: str) -> tuple[str, str, str | None] | None:
    """Returns bucket, key and, where one is named (`?versionId=`), the object's version of an S3 URI; None when it is none."""
    match = _URI.fullmatch(uri)
    return (match[1], match[2], match[3]) if match else None


def _failure(error: ClientError, bucket: str, key: str) -> BuildFailed:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return BuildFailed("S3_NO_SUCH_BUCKET", f"the bucket {bucket} does not exist")
    if code in ("NoSuchKey", "404", "NoSuchVersion"):
        return BuildFailed("S3_NO_SUCH_KEY", f"the bucket {bucket} has no object {key}")
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "301") or status == 301:
        return BuildFailed("S3_CROSS_REGION_ACCESS_DENIED", f"the bucket {bucket} is in another region")
    if code == "InvalidObjectState":
        return BuildFailed("S3_INVALID_OBJECT", f"s3://{bucket}/{key} is archived and cannot be read")
    if status in (401, 403):
        return BuildFailed("S3_ACCESS_DENIED", f"s3://{bucket}/{key} may not be read with the build role ({code})")
    return BuildFailed("INTERNAL_PLATFORM_ERROR", f"s3://{bucket}/{key}: {error}")


def _client(settings: Settings, credentials: Credentials) -> Any:
    endpoint = settings.object_store.endpoint
    if not endpoint and settings.object_store.embedded:
        endpoint = f"http://127.0.0.1:{settings.object_store.port}"
    styles: Any = {"addressing_style": settings.object_store.addressing}
    return boto3.client(
        "s3", region_name=settings.region, endpoint_url=endpoint or None,
        aws_access_key_id=credentials.access_key, aws_secret_access_key=credentials.secret, aws_session_token=credentials.token or None,
        config=Config(connect_timeout=5, read_timeout=30, retries={"max_attempts": 3}, s3=styles),
    )  # fmt: skip


def fetch(settings: Settings, credentials: Credentials, uri: str, target: Path) -> int:
    """Streams the artifact into a file; returns its bytes. Blocking. Raises BuildFailed."""
    parsed = parse_uri(uri)
    if parsed is None:
        raise BuildFailed("S3_INVALID_OBJECT", f"{uri} is not of the form s3://<bucket>/<key>")
    bucket, key, version = parsed
    size, began = 0, time.monotonic()
    try:
        answer = _client(settings, credentials).get_object(Bucket=bucket, Key=key, **({"VersionId": version} if version else {}))
        with target.open("wb") as file:
            # What has come, and not a whole chunk: a store that drips would hold that up for ever (botocore has no name for it).
            while chunk := answer["Body"]._raw_stream.read1(_CHUNK):
                size += len(chunk)
                if size > settings.images.archive_bytes:
                    raise BuildFailed("S3_INVALID_OBJECT", f"{uri} is larger than {settings.images.archive_bytes} bytes")
                file.write(chunk)
                if (took := time.monotonic() - began) > _FETCH_SECONDS + size / _FETCH_BYTES_PER_SECOND:
                    raise BuildFailed("INTERNAL_PLATFORM_ERROR", f"the object store is too slow: {size} bytes of {uri} in {took:.0f} s")
        if size != answer["ContentLength"]:
            raise BuildFailed(
                "INTERNAL_PLATFORM_ERROR", f"the object store broke off after {size} of {answer['ContentLength']} bytes of {uri}"
            )
    except ClientError as error:
        raise _failure(error, bucket, key) from error
    except (BotoCoreError, HTTPError) as error:
        raise BuildFailed("INTERNAL_PLATFORM_ERROR", f"the object store cannot be reached: {error}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildFailed("DISK_STORAGE_FULL", f"no room for {uri} on the host") from error
        raise
    return size


class _Told(msgspec.Struct):
    """What the process says at its end (gateway/images/unpack.py)."""

    code: str
    text: str
    walls: list[str] = []


async def _said(process: asyncio.subprocess.Process, pipe: asyncio.StreamReader | None) -> bytes:
    """Returns what the process has said there. One that says more than it may has been taken over, and is ended; the pipe's rest is read,
    or its end would not be seen."""
    assert pipe is not None
    said = bytearray()
    while data := await pipe.read(_TOLD_BYTES):
        said += data[: _TOLD_BYTES - len(said)]
        if len(said) == _TOLD_BYTES and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return bytes(said)


async def unpack(settings: Settings, archive: Path, target: Path) -> None:
    """Writes the build's context and its Dockerfile (gateway.images.unpack) below `target`.

    Raises BuildFailed; the target may then hold parts, and is the caller's to remove.
    """
    if target.exists():  # of a service that ended meanwhile
        await executors.BULK.run(partial(shutil.rmtree, target, ignore_errors=True))
    target.mkdir(mode=0o755, parents=True)
    limits = settings.images
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway.images.unpack", str(archive), str(target),
        str(limits.unpacked_bytes), str(limits.unpacked_entries), str(limits.ratio),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    )  # fmt: skip
    try:
        async with asyncio.timeout(_UNPACK_SECONDS):
            out, errors = await asyncio.gather(_said(process, process.stdout), _said(process, process.stderr))
            await process.wait()
    except TimeoutError as error:
        raise BuildFailed("ARCHIVE_INVALID", f"the artifact was not unpacked in {_UNPACK_SECONDS} s") from error
    finally:
        if process.returncode is None:  # also where the build is called off
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    try:
        told = msgspec.json.decode(out, type=_Told)
    except (ValueError, RecursionError) as error:
        raise BuildFailed("ARCHIVE_INVALID", f"the artifact could not be unpacked: {errors.decode(errors='replace')[-200:]}") from error
    if missing := {confine.LANDLOCK, confine.FILTER} - set(told.walls):
        log.warning("unpacker.less_confined", missing=sorted(missing))
    if told.code:
        raise BuildFailed(told.code, told.text)
