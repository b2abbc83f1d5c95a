"""Which registries a build is logged in to, and with whose permission."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from gateway.accounts.directory import Credentials
from gateway.config import Images
from gateway.images import bases

ROLE = "arn:aws:iam::123456789012:role/build"
MADE = Credentials("ASIA1", "secret", "token", 0)
HOST = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"


class Ecr:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.refuses = False
        monkeypatch.setattr(bases, "_ecr", self._client)

    def _client(self, endpoint: str, region: str, credentials: Credentials) -> Any:
        self.asked.append((endpoint, region, credentials.access_key))
        return self

    def get_authorization_token(self) -> Any:
        if self.refuses:
            raise bases.ClientError({"Error": {"Code": "AccessDeniedException"}}, "GetAuthorizationToken")
        return {"authorizationData": [{"authorizationToken": "bG9naW4=", "proxyEndpoint": "https://registry.example:5000"}]}


@pytest.fixture
def ecr(monkeypatch: pytest.MonkeyPatch) -> Ecr:
    return Ecr(monkeypatch)


def logins(
    dockerfile: str = "FROM x", role: str = ROLE, credentials: Credentials | None = MADE, **settings: Any
) -> tuple[dict[str, str], list[str]]:
    said: list[str] = []
    return bases.logins(Images(**settings), "us-east-1", role, credentials, dockerfile, said.append), said


def test_the_ecr_that_a_dockerfile_names_is_asked_in_its_region(ecr: Ecr) -> None:
    found, said = logins(f"ARG BASE={HOST}/team/base:1\nFROM $BASE\n")
    assert found[HOST] == "bG9naW4=" and ecr.asked == [("", "eu-west-1", "ASIA1")] and not said


def test_no_ecr_is_asked_where_none_is_named_or_no_credentials_are_real(ecr: Ecr) -> None:
    assert logins() == ({}, []) and logins(f"FROM {HOST}/x", credentials=None) == ({}, [])
    assert logins(f"FROM {HOST}.evil.example/x:1")[0].keys() <= {HOST, "registry.example:5000"}  # the login is for ECR's own name only
    assert logins("FROM 123456789012.dkr.ecr.evil.example/x") == ({}, [])


def test_an_endpoint_of_the_settings_names_its_registry(ecr: Ecr) -> None:
    found, _ = logins(ecr_endpoint="http://127.0.0.1:1")
    assert found == {"registry.example:5000": "bG9naW4="} and ecr.asked == [("http://127.0.0.1:1", "us-east-1", "ASIA1")]


def test_a_refusal_is_said_and_takes_nothing_else(ecr: Ecr, tmp_path: Path) -> None:
    ecr.refuses = True
    (tmp_path / "password").write_text("p:w\n")
    kept = {"own.example": {"user": "u", "password_file": str(tmp_path / "password"), "roles": [ROLE]}}
    found, said = logins(f"FROM {HOST}/x", logins=kept)
    assert list(found) == ["own.example"] and "no login to ECR in eu-west-1" in said[0] and ROLE in said[0]


@pytest.mark.parametrize(
    ("role", "given"), [(ROLE, True), ("arn:aws:iam::123456789012:role/team/ci", True), ("arn:aws:iam::999999999999:role/build", False)]
)
def test_kept_logins_are_for_their_roles(tmp_path: Path, role: str, given: bool) -> None:
    (tmp_path / "password").write_text("p:w\n")
    kept = {"own.example": {"user": "u", "password_file": str(tmp_path / "password"), "roles": ["arn:aws:iam::123456789012:role/*"]}}
    found, said = logins(role=role, logins=kept, credentials=None)
    assert found == ({"own.example": base64.b64encode(b"u:p:w").decode()} if given else {}) and not said


def test_a_password_that_is_not_there_is_said(tmp_path: Path) -> None:
    kept = {"own.example": {"user": "u", "password_file": str(tmp_path / "none"), "roles": ["*"]}}
    found, said = logins(logins=kept, credentials=None)
    assert not found and said == [f"no login to own.example: {tmp_path}/none: No such file or directory"]
