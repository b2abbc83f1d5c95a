"""The wall of TLS does not fall by age: the service renews its own certificates while it runs, and no connection ends for it.

Taken away by name: the renewal in the supervisor's look at certificates (gateway/instance.py, `update_certificates`).
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from pathlib import Path

import pytest
from cryptography import x509
from edge_rig import HOST, Rig, response
from test_api_wire import served_by
from waiting import until

from gateway import instance, supervisor
from gateway.api.connections import Certificate
from gateway.config import Settings
from gateway.edge.client.certificates import Certificates
from gateway.edge.client.tls import TlsServer

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")
DAY = 86_400


class Clock:
    """Behind by some days: what was made then has this age."""

    def __init__(self, days: float) -> None:
        self.days = days

    def __call__(self) -> float:
        return time.time() - self.days * DAY


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of a service that has run for longer than its certificates are good."""
    one = Settings(root=tmp_path / "root", run=tmp_path / "run", api={"tls": True})  # type: ignore[arg-type]
    one.tls_dir.mkdir(parents=True)
    instance.make_certificates(one, Clock(400))
    return one


def chain(settings: Settings, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((settings.tls_dir / f"{name}.crt").read_bytes())


@pytest.mark.parametrize("name", ["edge", "api"])
def test_they_are_renewed_a_month_before_they_expire_and_not_before(settings: Settings, name: str) -> None:
    first, authority = chain(settings, name), (settings.tls_dir / "ca.crt").read_bytes()
    instance.update_certificates(settings, Clock(400 - 365))
    assert chain(settings, name) == first
    instance.update_certificates(settings, Clock(400 - 368))
    renewed = chain(settings, name)
    assert renewed != first and (renewed.not_valid_after_utc - first.not_valid_after_utc).days in (367, 368)
    key = (settings.tls_dir / f"{name}.key").stat()
    assert (key.st_mode & 0o777, key.st_uid) == (0o600, settings.users.edge if name == "edge" else settings.users.control)
    assert (settings.tls_dir / "ca.crt").read_bytes() == authority, "clients trust that"
    instance.update_certificates(settings, Clock(400 - 368))
    assert chain(settings, name) == renewed


@pytest.mark.parametrize("named", ["edge", "api"])
def test_what_the_settings_name_is_the_operators_to_renew(settings: Settings, tmp_path: Path, named: str) -> None:
    for end in ("crt", "key"):
        (tmp_path / f"own.{end}").write_bytes((settings.tls_dir / f"{named}.{end}").read_bytes())
    ours = {"certificate": str(tmp_path / "own.crt"), "key": str(tmp_path / "own.key")}
    other = {"api": {"tls": True, **ours}} if named == "api" else {"edge": ours, "api": {"tls": True}}
    before = chain(settings, named)
    instance.update_certificates(Settings(root=settings.root, run=settings.run, **other))  # type: ignore[arg-type]
    assert chain(settings, named) == before


@pytest.mark.parametrize("broken", ["other", "empty"])
def test_half_of_a_pair_is_made_whole(settings: Settings, broken: str) -> None:
    """A power cut came between the two files: no worker could start."""
    instance.update_certificates(settings)
    key = settings.tls_dir / "edge.key"
    key.write_bytes((settings.tls_dir / "api.key").read_bytes() if broken == "other" else b"")
    with pytest.raises(ssl.SSLError):
        Certificates(settings.tls_dir)
    instance.update_certificates(settings)
    assert Certificates(settings.tls_dir).context


@pytest.mark.parametrize("renews", [True, False])
async def test_a_service_that_has_run_for_a_year_is_trusted_and_cuts_nobody(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renews: bool
) -> None:
    """The supervisor's look at certificates, an edge and the API as they run. A connection of before goes on; a client that checks is
    let in, and without the renewal says that the certificate has expired."""
    if not renews:
        monkeypatch.setattr(instance, "_leaves", lambda settings: [])
    monkeypatch.setattr(supervisor, "_CERTIFICATES_SECONDS", 0.001)
    rig = Rig(tmp_path, monkeypatch)
    await rig.start()
    edge, api = Certificates(settings.tls_dir), Certificate(settings.tls_dir / "api.crt", settings.tls_dir / "api.key")
    server = await asyncio.get_running_loop().create_server(lambda: TlsServer(edge.context, rig.worker._application), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    trusting, blind = ssl.create_default_context(cafile=str(settings.tls_dir / "ca.crt")), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=blind, server_hostname=HOST)
    one = supervisor.Supervisor(settings)
    one._files.start()
    looks = 0
    update = instance.update_certificates

    def counted(known: Settings) -> None:
        nonlocal looks
        update(known)
        looks += 1

    monkeypatch.setattr(instance, "update_certificates", counted)
    keeper = asyncio.ensure_future(one.keep_certificates())
    try:
        before = served_by(api.context)
        await until(lambda: looks > 1)
        assert edge.refresh() is True  # a ticket key there is now in any case
        await api.renew()
        writer.write(rig.request())
        assert (await response(reader))[0] == 200, "on the connection of before"
        assert (served_by(api.context) != before) is renews
        if renews:
            _, second = await asyncio.open_connection("127.0.0.1", port, ssl=trusting, server_hostname=HOST)
            second.close()
        else:
            with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
                await asyncio.open_connection("127.0.0.1", port, ssl=trusting, server_hostname=HOST)
    finally:
        keeper.cancel()
        one._files.close()
        writer.close()
        server.close()
        await rig.stop()
