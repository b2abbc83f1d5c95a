"""Credentials of a microVM's role: from our own issuer, or from a real STS where the settings name one; kept until they are old."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import boto3
from botocore.config import Config

from gateway import executors
from gateway.accounts.directory import Credentials as Made
from gateway.accounts.directory import Directory
from gateway.config import Credentials

_RENEW_SECONDS = 20 * 60  # before their end; SDKs ask again when a quarter of an hour is left
_STS_SECONDS = 3600


class Issuer:
    def __init__(self, settings: Credentials, region: str, directory: Directory, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._region = region
        self._directory = directory
        self._clock = clock

    def of(self, role: str, name: str) -> Kept:
        """Returns the credentials of `role` for the microVM `name`."""
        return Kept(self, role, name, self._clock)

    async def make(self, role: str, name: str) -> Made:
        if not self._settings.sts_endpoint:
            return self._directory.issue(role, name)
        return await executors.LATENCY.run(self._assume, role, name)

    def _assume(self, role: str, name: str) -> Made:
        client = boto3.client(
            "sts", region_name=self._region, endpoint_url=self._settings.sts_endpoint,
            aws_access_key_id=self._settings.access_key or None, aws_secret_access_key=self._settings.secret_key or None,
            config=Config(connect_timeout=3, read_timeout=5, retries={"max_attempts": 2}),
        )  # fmt: skip
        made = client.assume_role(RoleArn=role, RoleSessionName=name[:64], DurationSeconds=_STS_SECONDS)["Credentials"]
        return Made(made["AccessKeyId"], made["SecretAccessKey"], made["SessionToken"], made["Expiration"].timestamp())


class Kept:
    """One microVM's credentials; made again when they get old, also after a sleep."""

    def __init__(self, issuer: Issuer, role: str, name: str, clock: Callable[[], float]) -> None:
        self._issuer = issuer
        self._role = role
        self._name = name
        self._clock = clock
        self._made: Made | None = None
        self._lock = asyncio.Lock()

    async def __call__(self) -> Made:
        async with self._lock:
            if self._made is None or self._made.expires_at - self._clock() < _RENEW_SECONDS:
                self._made = await self._issuer.make(self._role, self._name)
            return self._made
