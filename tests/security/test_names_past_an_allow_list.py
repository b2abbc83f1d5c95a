"""Egress by name: nothing leaves to where no group names it, whatever a guest's root says, asks or sends; and each decision is told.

Every attack has its control: the wall that it meets is taken away by its name, and it succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from named_way import ADDRESS, NAME, OTHER, OTHERS_ADDRESS, PRIVATE, NamedWay
from test_allowed_names import question
from test_client_hello import hello, real, records, server_name
from test_way_out import SYN, _tcp

from gateway.guest import allowed_names, client_hello, proxy, relay
from gateway.guest.allow_list import AllowList
from gateway.guest.allowed_names import AllowedNames
from gateway.guest.relay import _ALERT
from vmm.egress import METADATA_ADDRESS, RELAY_PORT
from vmm.network import HOST_ADDRESS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces")
HTTPS = f"https:{NAME}"
ENCRYPTED = records(hello(server_name(NAME.encode()), (0xFE0D, b"\0secret")))


@pytest.fixture
async def way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NamedWay]:
    one = NamedWay(tmp_path, monkeypatch)
    one.world.start()
    yield one
    await one.close()


async def test_what_a_group_names_is_reached(way: NamedWay) -> None:
    await way.open(HTTPS)
    assert await way.ask(NAME) == (0, [ADDRESS])
    assert await way.say(ADDRESS, 443, real(NAME)) == way.world.heard[0][2], "as it was said"
    assert way.verdicts() == [("allowed", "")]


async def test_a_hello_in_many_segments_and_records_is_put_together_and_passed_on_as_it_came(way: NamedWay) -> None:
    await way.open(HTTPS)
    said = records(hello(server_name(NAME.encode())), 11)
    assert await way.say(ADDRESS, 443, *(said[at : at + 7] for at in range(0, len(said), 7))) == said
    assert b"".join(data for _, _, data in way.world.heard) == said


async def test_bytes_are_counted_and_a_half_close_is_passed_on(way: NamedWay) -> None:
    await way.open(HTTPS)
    said = real(NAME) + bytes(1 << 20)
    loop = asyncio.get_running_loop()
    with way.socket() as sock:
        async with asyncio.timeout(20):
            await loop.sock_connect(sock, (ADDRESS, 443))

            async def read() -> bytes:
                found = b""
                while data := await loop.sock_recv(sock, 65536):
                    found += data
                return found

            answer = asyncio.create_task(read())
            await loop.sock_sendall(sock, said)
            sock.shutdown(socket.SHUT_WR)
            assert await answer == said
            while not (ends := [line for line in way.lines() if line["verdict"] == "ended"]):
                await asyncio.sleep(0.01)
    assert [(line["name"], line["address"], line["port"], line["sent"], line["received"]) for line in ends] == [
        (NAME, ADDRESS, 443, len(said), len(said))
    ]


async def test_other_names_are_refused_and_nobody_hears_of_them(way: NamedWay) -> None:
    await way.open(HTTPS)
    for name in (OTHER, f"secret.{NAME}", "example.org"):
        assert await way.ask(name) == (5, [])
    assert await way.ask(NAME, 16) == (5, []), "TXT"
    assert way.world.asked == []
    assert {(line["name"], line["verdict"]) for line in way.lines("name")} >= {(OTHER, "refused"), (f"secret.{NAME}", "refused")}


async def test_questions_over_tcp_are_answered_by_the_same_list(way: NamedWay) -> None:
    await way.open(HTTPS)
    asked = b"".join(len(one).to_bytes(2, "big") + one for one in (question(NAME), question(OTHER), question(NAME, 16)))
    answers = (await way.say(HOST_ADDRESS, 53, asked, b"\0" * 16)) or b""  # with 16 bytes more, an address's, than the questions
    found = []
    while answers:
        length = int.from_bytes(answers[:2], "big")
        found.append((answers[5] & 15, int.from_bytes(answers[8:10], "big")))
        answers = answers[2 + length :]
    assert found == [(0, 1), (5, 0), (5, 0)] and way.world.asked == [NAME]


async def test_without_the_list_other_names_are_answered(way: NamedWay) -> None:
    await way.open(is_walled=False)
    assert await way.ask(OTHER) == (0, [OTHERS_ADDRESS])
    assert way.world.asked == [OTHER]


def no_check(monkeypatch: pytest.MonkeyPatch, *walls: str) -> None:
    async def yes(*arguments: object) -> bool:
        return True

    for wall in walls:
        match wall:
            case "what the client says":
                monkeypatch.setattr(AllowList, "takes", lambda *arguments: True)
            case "what the resolver answered":
                monkeypatch.setattr(AllowedNames, "is_address", yes)
            case "encrypted hellos":
                monkeypatch.setattr(client_hello, "_ENCRYPTED", -1)
            case "a name":
                monkeypatch.setattr(relay.Peeked, "feed", lambda self, data: bool(self.data.extend(data)) or bool(self.data))


ATTACKS = {  # what, where to, what is said, the reason, walls
    "another name": (ADDRESS, real(OTHER), "no group names it for https at this port", ("what the client says", "what the resolver answered")),
    "a name that is not that address's": (OTHERS_ADDRESS, real(NAME), "no address of the host that the client names", ("what the resolver answered",)),
    "an address, without a name": (ADDRESS, real(None), "the client names no host", ("a name", "what the client says", "what the resolver answered")),
    "an encrypted hello behind an allowed one": (ADDRESS, ENCRYPTED, "an encrypted ClientHello (ECH)", ("encrypted hellos",)),
    "no TLS": (ADDRESS, b"SSH-2.0-x\r\n\r\n\r\n", "no HTTP/1 request", ("a name", "what the client says", "what the resolver answered")),
    "plain HTTP at the port of TLS": (
        ADDRESS, f"GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode(), "no group names it for http at this port", ("what the client says",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ATTACKS)
async def test_a_client_that_says_something_else_is_refused(way: NamedWay, what: str) -> None:
    address, said, reason, _ = ATTACKS[what]
    await way.open(HTTPS)
    await way.ask(NAME)
    answer = await way.say(address, 443, said)
    assert answer != said and (answer is None or answer == _ALERT or answer.startswith(b"HTTP/1.1 403 "))
    assert way.verdicts() == [("refused", reason)] and not way.world.heard


@pytest.mark.parametrize("what", ATTACKS)
async def test_without_the_wall_it_gets_out(way: NamedWay, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    address, said, _, walls = ATTACKS[what]
    no_check(monkeypatch, *walls)
    await way.open(HTTPS)
    assert await way.say(address, 443, said) == said


async def test_http_is_known_by_its_host(way: NamedWay) -> None:
    await way.open(f"http:{NAME}")
    said = f"GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode()
    assert await way.say(ADDRESS, 80, said) == said
    other = (await way.say(ADDRESS, 80, said.replace(NAME.encode(), OTHER.encode()))) or b""
    assert other.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert [data for _, _, data in way.world.heard] == [said]


async def test_metadata_is_not_what_http_is_allowed_to(way: NamedWay) -> None:
    await way.open(f"http:{NAME}")
    answer = await way.say(METADATA_ADDRESS, 80, b"GET /latest/meta-data/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", b"", seconds=3)
    assert (answer or b"").startswith(b"HTTP/1.1 401 ")


async def test_any_protocol_to_an_address_of_the_name_and_to_no_other(way: NamedWay) -> None:
    await way.open(f"tcp:{NAME}:5432")
    assert await way.say(ADDRESS, 5432, b"\0\0\0\x08") == b"\0\0\0\x08"
    assert await way.say(OTHERS_ADDRESS, 5432, b"\0\0\0\x08") is None
    assert way.verdicts() == [("allowed", ""), ("refused", "no address of a host that a group names at this port")]


async def test_a_port_with_both_kinds_of_rule(way: NamedWay) -> None:
    way.world.names["db.example.org"] = [OTHERS_ADDRESS]
    await way.open(HTTPS, "tcp:db.example.org:443")
    assert await way.say(OTHERS_ADDRESS, 443, b"hello") == b"hello"
    assert await way.say(ADDRESS, 443, real(NAME)) is not None
    assert await way.say(ADDRESS, 443, real(OTHER)) == _ALERT
    assert way.verdicts() == [("allowed", ""), ("allowed", ""), ("refused", "no group names it for https at this port")]


@pytest.mark.parametrize("port", [22, 8443, 80])
async def test_other_ports_are_shut(way: NamedWay, port: int) -> None:
    await way.open(HTTPS)
    assert await way.say(ADDRESS, port, real(NAME), seconds=1) is None
    assert not way.world.heard


async def test_without_the_list_other_ports_are_open(way: NamedWay) -> None:
    await way.open(is_walled=False)
    assert await way.say(ADDRESS, 8443, b"hello") == b"hello"


async def test_quic_stays(way: NamedWay) -> None:
    """It would be past the relay, and its server names are encrypted."""
    listener = way.world.bound(socket.SOCK_DGRAM, ADDRESS, 443)
    with listener:
        await way.open(HTTPS)
        with way.socket(socket.SOCK_DGRAM) as sock:
            sock.sendto(b"quic", (ADDRESS, 443))
            with pytest.raises(TimeoutError):
                listener.recv(100)
        await way.close_services()
        await way.open(HTTPS, networks=(f"{ADDRESS}/32",), ports=("udp:443",))  # the control: a group opens it
        with way.socket(socket.SOCK_DGRAM) as sock:
            sock.sendto(b"quic", (ADDRESS, 443))
            assert listener.recv(100) == b"quic"


# ---- addresses inside ----


async def test_a_name_that_points_inside_opens_nothing(way: NamedWay) -> None:
    way.world.names[NAME] = [PRIVATE]
    await way.open(HTTPS)
    assert await way.ask(NAME) == (0, [])
    assert await way.say(PRIVATE, 443, real(NAME)) == _ALERT
    assert way.verdicts() == [("refused", "no address of the host that the client names")]
    assert way.lines("name")[0]["reason"] == "no address of the internet"


async def test_its_second_layer_is_the_links_own_filter(way: NamedWay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowed_names, "is_internet", lambda address: True)
    monkeypatch.setattr(proxy, "_CONNECT_SECONDS", 0.5)
    way.world.names[NAME] = [PRIVATE]
    await way.open(HTTPS)
    assert await way.say(PRIVATE, 443, real(NAME)) == _ALERT
    assert way.verdicts() == [("refused", "no answer in 0.5 s")] or "not reached" in way.verdicts()[0][1]


async def test_without_both_layers_it_is_reached(way: NamedWay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowed_names, "is_internet", lambda address: True)
    way.world.names[NAME] = [PRIVATE]
    await way.open(HTTPS, closed=("192.0.2.0/24",))
    assert await way.say(PRIVATE, 443, real(NAME)) is not None
    assert way.world.heard[0][0] == PRIVATE


async def test_a_connectors_own_networks_are_reached_by_name(way: NamedWay) -> None:
    way.world.names[NAME] = [PRIVATE]
    await way.open(HTTPS, networks=("10.9.0.0/16",))
    assert await way.say(PRIVATE, 443, real(NAME)) is not None
    assert await way.say(PRIVATE, 443, real(OTHER)) == _ALERT, "by that name alone"
    assert await way.say(PRIVATE, 80, b"hello", seconds=1) is None


async def test_networks_with_ports_are_open_beside(way: NamedWay) -> None:
    await way.open(HTTPS, networks=(f"{OTHERS_ADDRESS}/32",), ports=("tcp:443",))
    assert await way.say(OTHERS_ADDRESS, 443, b"hello") == b"hello"
    assert way.lines() == [], "no decision of the relay's"


# ---- the relay itself ----


async def test_the_relays_own_door_leads_nowhere(way: NamedWay) -> None:
    await way.open(HTTPS)
    assert await way.say(HOST_ADDRESS, RELAY_PORT, real(NAME)) == _ALERT


async def test_another_source_is_not_passed_on(way: NamedWay) -> None:
    await way.open(HTTPS)
    seen = way.world.namespace.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)))
    with seen:

        def send() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
                raw.sendto(_tcp("198.51.100.77", ADDRESS, SYN, 443), (ADDRESS, 0))

        way.guest.inside(send)
        assert await way.say(ADDRESS, 443, real(NAME)) is not None
        sources = {socket.inet_ntoa(seen.recv(2048)[12:16])}
        seen.setblocking(False)
        while True:
            try:
                sources.add(socket.inet_ntoa(seen.recv(2048)[12:16]))
            except BlockingIOError:
                break
        assert "198.51.100.77" not in sources and "100.64.0.3" in sources
    assert len(way.verdicts()) == 1


async def test_who_says_nothing_is_let_go(way: NamedWay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_PEEK_SECONDS", 0.3)
    await way.open(HTTPS)
    assert await way.say(ADDRESS, 443, real(NAME)[:40]) == _ALERT
    assert way.verdicts() == [("refused", "the client says nothing in time")]


async def test_one_microvm_has_so_many_connections_and_the_next_waits_for_its_turn(way: NamedWay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "CONNECTIONS", 4)
    monkeypatch.setattr(relay, "_PEEK_SECONDS", 30.0)
    await way.open(HTTPS)
    loop = asyncio.get_running_loop()
    held = [way.socket() for _ in range(4)]
    try:
        async with asyncio.timeout(10):
            for sock in held:
                await loop.sock_connect(sock, (ADDRESS, 443))
            waits = asyncio.create_task(way.say(ADDRESS, 443, real(NAME)))
            done, _ = await asyncio.wait([waits], timeout=0.3)
            assert not done
            held.pop().close()
            assert await waits is not None
    finally:
        for sock in held:
            sock.close()


async def test_so_many_connections_a_second(way: NamedWay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "_BURST", 5)
    monkeypatch.setattr(proxy, "_RATE", 0.001)
    await way.open(HTTPS)
    for _ in range(7):
        await way.say(ADDRESS, 443, real(NAME))
    assert way.verdicts() == [("allowed", "")] * 5 + [("refused", "too many connections")] * 2


# ---- as a process ----


async def test_the_relay_is_a_process_that_another_takes_the_place_of(way: NamedWay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "_AGAIN_SECONDS", 0.05)
    await way.open(HTTPS, process=True)
    assert await way.say(ADDRESS, 443, real(NAME), seconds=30) is not None
    (child,) = children()
    status = Path(f"/proc/{child}/status").read_text()
    assert "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status
    assert not [fd for fd in Path(f"/proc/{child}/fd").iterdir() if "/egress/" in os.readlink(fd)]
    os.kill(child, signal.SIGKILL)
    assert await way.say(ADDRESS, 443, real(NAME), seconds=30) is not None
    assert children() != [child]


async def test_a_relay_that_nobody_needs_ends(way: NamedWay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "_LINGER_SECONDS", 0.01)
    await way.open(HTTPS, process=True)
    assert await way.say(ADDRESS, 443, real(NAME), seconds=30) is not None
    running = way.guests._proxies["1"]._running
    assert running is not None and children()
    way.shut()
    async with asyncio.timeout(30):
        await running
    assert children() == []
    assert [line["verdict"] for line in way.lines()] == ["allowed", "ended"]


@pytest.mark.parametrize(("account", "relays"), [("2", 2), ("1", 1)])
async def test_each_account_has_a_relay_of_its_own(
    way: NamedWay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: str, relays: int
) -> None:
    """Whoever takes one over, or fills it, has its own account's connections."""
    other = NamedWay(tmp_path, monkeypatch)
    try:
        await way.open(HTTPS, process=True)
        await other.open(HTTPS, process=True, account=account, guests=way.guests)
        assert len(children()) == relays
    finally:
        await other.close()


def children() -> list[int]:
    found = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for child in (task / "children").read_text().split():
                if b"gateway.guest.relay" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found
