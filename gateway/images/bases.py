"""Logins to the registries of private base images: ECR's, given to the build role, and those that the settings keep for it.

ECR's authorization token is a registry password for whoever asked (ECR GetAuthorizationToken); what the role may pull, ECR decides.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from gateway.accounts.directory import Credentials
from gateway.config import Images

_ECR = re.compile(r"\b\d{12}\.dkr\.ecr(?:-fips)?\.([a-z]{2}[a-z0-9-]+-\d)\.amazonaws\.com(?:\.cn)?\b")


def logins(
    settings: Images, region: str, role: str, credentials: Credentials | None, dockerfile: str, say: Callable[[str], None]
) -> dict[str, str]:
    """Returns base64 of `user:password` by registry host (containers-auth.json(5)), for a build with `role`. Blocking.

    A login that cannot be had is said and left out: the pull then fails where it was needed, and only there.
    """
    found: dict[str, str] = {}
    for host, kept in settings.logins.items():
        if any(fnmatchcase(role, pattern) for pattern in kept.roles):
            try:
                password = Path(kept.password_file).read_text(encoding="utf-8").strip()
            except OSError as error:
                say(f"no login to {host}: {kept.password_file}: {error.strerror}")
                continue
            found[host] = base64.b64encode(f"{kept.user}:{password}".encode()).decode()
    if credentials is None:
        return found
    named = {match[0]: match[1] for match in _ECR.finditer(dockerfile)}
    for where_from in sorted({region} if settings.ecr_endpoint else set(named.values())):
        try:
            granted = _ecr(settings.ecr_endpoint, where_from, credentials).get_authorization_token()["authorizationData"][0]
        except (BotoCoreError, ClientError) as error:
            say(f"no login to ECR in {where_from} for {role}: {error}")
            continue
        hosts = [host for host, where in named.items() if where == where_from]
        found |= dict.fromkeys([*hosts, urlsplit(granted["proxyEndpoint"]).netloc], granted["authorizationToken"])
    return found


def _ecr(endpoint: str, region: str, credentials: Credentials) -> Any:
    return boto3.client(
        "ecr", region_name=region, endpoint_url=endpoint or None, aws_access_key_id=credentials.access_key,
        aws_secret_access_key=credentials.secret, aws_session_token=credentials.token,
        config=Config(connect_timeout=3, read_timeout=10, retries={"max_attempts": 2}),
    )  # fmt: skip
