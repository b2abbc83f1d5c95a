"""boto3 clients for the instance that the environment, or the default root, names."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from gateway import config, instance

from .output import fail, no_instance


@cache
def settings() -> config.Settings:
    return config.load()


@cache
def session() -> Any:
    """A user's own AWS variables win; without them the default instance's profile is used."""
    if "AWS_CONFIG_FILE" not in os.environ:
        profile = instance.environment(settings())
        if not Path(profile["AWS_CONFIG_FILE"]).is_file():
            no_instance(settings().root)
        os.environ.update({name: value for name, value in profile.items() if name.startswith("AWS_")})
    return boto3.Session()


def client(name: str = "lambda-microvms") -> Any:
    return session().client(name, config=Config(connect_timeout=5, read_timeout=60, retries={"max_attempts": 2}))


def account_and_region() -> tuple[str, str]:
    return settings().account, session().region_name


def image_arn(name: str) -> str:
    """A name or an ARN."""
    account, region = account_and_region()
    return name if name.startswith("arn:") else f"arn:aws:lambda:{region}:{account}:microvm-image:{name}"


def role_arn(name: str) -> str:
    return f"arn:aws:iam::{account_and_region()[0]}:role/{name}"


def bundle() -> str:
    """Returns the certificates that endpoints are checked with: those beside the instance's AWS profile, else CURL_CA_BUNDLE."""
    session()
    beside = Path(os.environ["AWS_CONFIG_FILE"]).parents[1] / "tls/bundle.crt"
    return str(beside) if beside.is_file() else os.environ.get("CURL_CA_BUNDLE", "/etc/ssl/certs/ca-certificates.crt")


def resolve(text: str) -> str:
    """Returns a microVM's id from itself, or from a beginning of it that is unique."""
    if len(text) >= len("microvm-") + 36:
        return text
    wanted = text if text.startswith("microvm-") else f"microvm-{text}"
    found = [item["microvmId"] for item in all_microvms() if item["microvmId"].startswith(wanted)]
    if len(found) != 1:
        fail(f"{text} names {len(found)} microVMs: give more of the id (torpor ps)", 3)
    return str(found[0])


def all_microvms() -> list[dict[str, Any]]:
    return _all("list_microvms")


def all_images() -> list[dict[str, Any]]:
    return _all("list_microvm_images")


def _all(operation: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    arguments: dict[str, str] = {}
    while True:
        page = getattr(client(), operation)(**arguments)
        items += page["items"]
        if not page.get("nextToken"):
            return items
        arguments = {"nextToken": page["nextToken"]}


def connector_arn(name: str) -> str:
    """Returns a managed network connector's ARN."""
    return f"arn:aws:lambda:{session().region_name}:aws:network-connector:aws-network-connector:{name}"
