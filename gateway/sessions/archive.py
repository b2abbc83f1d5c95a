"""The archived tier: sessions that sleep for long are packed, moved to the object store, and fetched when somebody asks (archiving.py)."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import boto3
import structlog
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from gateway import executors
from gateway.config import Settings

from .host import Host, RpcError, grown
from .model import Archived, Session

log = structlog.get_logger()

_ASK_SECONDS = 600.0
_IN_ITS_THREAD = TransferConfig(use_threads=False)  # boto3 starts ten for each transfer otherwise


class ArchiveError(Exception):
    """The object store has not given, or not taken, an archive; it may later."""


class ArchiveDamaged(ArchiveError):
    """What the object store has given is not what it took. It stays there: a version of before may be put in its place."""


def default_client(settings: Settings, credentials: tuple[str, str]) -> Any:
    store = settings.object_store
    endpoint = store.endpoint or (f"http://127.0.0.1:{store.port}" if store.embedded else None)
    styles: Any = {"addressing_style": store.addressing}
    return boto3.client(
        "s3", region_name=settings.region, endpoint_url=endpoint, aws_access_key_id=credentials[0], aws_secret_access_key=credentials[1],
        config=Config(connect_timeout=5, read_timeout=60, retries={"max_attempts": 3}, s3=styles),
    )  # fmt: skip


@dataclass
class _Put:
    key: str
    descriptor: int
    is_unwanted: bool = False


class Archive:
    def __init__(self, settings: Settings, host: Host, client: Callable[[], Any]) -> None:
        self._settings = settings.archive
        self._directory = settings.control_dir / "archive"
        self._host = host
        self._client = client
        self._is_made = False

    def key(self, session: Session) -> str:
        """Returns a key that no archive has had: what removes one, however late, removes no other."""
        return f"{self._settings.prefix}{session.account}/{session.id}/{session.incarnation}-{secrets.token_hex(4)}.tar.zst"

    async def store(self, session: Session, key: str) -> Archived:
        """Packs a sleeping session and puts it into the bucket. Raises ArchiveError, RpcError."""
        self._directory.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=self._directory) as file:
            packed = await self._host.pack(session.id, session.incarnation, file.fileno(), session.snapshot_bytes)
            put = _Put(key, os.dup(file.fileno()))
            try:
                await self._ask(lambda: self._put(put), packed.size)
            except BaseException:
                put.is_unwanted = True
                raise
        return Archived(key, packed.size, packed.digest)

    async def fetch(self, session: Session, archived: Archived) -> None:
        """Brings a session's files back to the host. What came cut short or changed on its way is fetched once more, before the archive is
        said to be damaged. Raises ArchiveError, ArchiveDamaged, RpcError."""
        try:
            await self._fetch(session, archived)
        except ArchiveDamaged as error:
            log.warning("archive.fetched_again", session=session.id, error=str(error))
            await self._fetch(session, archived)

    async def _fetch(self, session: Session, archived: Archived) -> None:
        self._directory.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=self._directory) as file:
            await self._ask(lambda: self._get(archived.key, file), archived.size)
            file.flush()
            try:
                await self._host.unpack(session.id, archived.digest, file.fileno(), session.snapshot_bytes)
            except RpcError as error:
                if error.kind == "Damaged":
                    where = f"s3://{self._settings.bucket}/{archived.key}"
                    raise ArchiveDamaged(f"{where} is not what was stored there: {error}") from error
                raise

    async def remove(self, key: str) -> None:
        """Removes an archive, also one that is not there. Raises ArchiveError."""
        await self._ask(lambda: self._client().delete_object(Bucket=self._settings.bucket, Key=key))

    async def _ask(self, work: Callable[[], Any], size: int = 0) -> None:
        try:
            await executors.BULK.run(work, seconds=grown(_ASK_SECONDS, size))
        except (BotoCoreError, ClientError, S3UploadFailedError, OSError, RuntimeError, MemoryError) as error:
            raise ArchiveError(f"the object store: {error}") from error

    def _put(self, put: _Put) -> None:
        client, bucket = self._client(), self._settings.bucket
        if not self._is_made:
            if bucket not in [made["Name"] for made in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=bucket)
            self._is_made = True
        with os.fdopen(put.descriptor, "rb") as file:
            file.seek(0)
            client.upload_fileobj(file, bucket, put.key, Config=_IN_ITS_THREAD)
        if put.is_unwanted:  # it has taken longer than its deadline, and its key may have been removed before it was there
            client.delete_object(Bucket=bucket, Key=put.key)

    def _get(self, key: str, file: Any) -> None:
        self._client().download_fileobj(self._settings.bucket, key, file, Config=_IN_ITS_THREAD)
