"""The resolver of an allow-list: what goes out, what comes back, what is kept; the rules that hosts are given by."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Egress
from gateway.guest import dns, egress_audit
from gateway.guest.allow_list import AllowList, parse
from gateway.guest.allowed_names import AllowedNames
from gateway.guest.egress_audit import ALLOWED, ENDED, REFUSED, EgressAudit
from gateway.messages import HOST_RULE, EgressRules

NAME = "api.example.org"
PUBLIC, PRIVATE = "198.51.100.7", "10.9.0.7"


def encoded(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode("latin-1") for label in name.split(".") if label) + b"\0"


def question(name: str, kind: int = dns.A, more: bytes = b"", identifier: int = 7) -> bytes:
    return struct.pack(">HHHHHH", identifier, 0x0120, 1, 0, 0, bool(more)) + encoded(name) + struct.pack(">HH", kind, 1) + more


def record(owner: bytes, kind: int, data: bytes, seconds: int = 300) -> bytes:
    return owner + struct.pack(">HHIH", kind, 1, seconds, len(data)) + data


def answer(asked: bytes, *records: bytes, code: int = 0) -> bytes:
    end = asked.index(b"\0", 12) + 5
    return asked[:2] + struct.pack(">HHHHH", 0x8180 | code, 1, len(records), 0, 0) + asked[12:end] + b"".join(records)


def a(address: str, owner: bytes = b"\xc0\x0c", seconds: int = 300) -> bytes:
    return record(owner, dns.A, ipaddress.IPv4Address(address).packed, seconds)


class Server:
    """Answers each name with what it is given, and remembers what came."""

    def __init__(self, *records: bytes, code: int = 0) -> None:
        self.records, self.code = records, code
        self.asked: list[bytes] = []

    async def __call__(self, data: bytes) -> bytes | None:
        self.asked.append(data)
        await asyncio.sleep(0)
        return answer(data, *self.records, code=self.code)


class Rig:
    def __init__(self, server: Server, *hosts: str, networks: tuple[str, ...] = ()) -> None:
        self.now = 1000.0
        self.notes: list[tuple[str, str, str]] = []
        rules = EgressRules(False, list(networks), [], list(hosts))
        self.names = AllowedNames(rules, server, lambda *note: self.notes.append(note), lambda: self.now)

    async def ask(self, name: str, kind: int = dns.A, more: bytes = b"") -> tuple[int, list[str]]:
        """The response code, and the addresses."""
        asked = question(name, kind, more)
        reply = await self.names.reply(asked)
        end = len(question(name, kind))
        assert reply[:2] == asked[:2] and reply[12:end] == asked[12:end] and len(reply) <= 512
        count = int.from_bytes(reply[6:8], "big")
        assert len(reply) == end + 16 * count
        return reply[3] & 15, [str(ipaddress.IPv4Address(reply[at + 12 : at + 16])) for at in range(end, len(reply), 16)]


async def test_names_of_the_list_are_answered_and_others_refused() -> None:
    server = Server(a(PUBLIC))
    rig = Rig(server, f"https:{NAME}")
    assert await rig.ask("Api.Example.ORG") == (dns.NOERROR, [PUBLIC])
    for other in ("example.org", "evil.example", f"data.{NAME}", "api.example.org.evil.example", ""):
        assert await rig.ask(other) == (dns.REFUSED, []), other
    assert len(server.asked) == 1, "nobody hears of the others"
    assert [note[1] for note in rig.notes] == ["", *5 * ["no group names it"]]


async def test_nothing_of_the_question_goes_out_but_the_name() -> None:
    """Its identifier, the case of letters and options (a client's subnet) are words that somebody outside could read."""
    server = Server(a(PUBLIC))
    subnet = b"\0" + struct.pack(">HHIHHH", dns.OPT, 4096, 0, 8, 8, 4) + b"data"
    rig = Rig(server, f"https:{NAME}")
    assert await rig.ask("aPi.eXaMple.oRg", more=subnet) == (dns.NOERROR, [PUBLIC])
    sent = server.asked[0]
    assert sent[2:12] == struct.pack(">HHHHH", 0x0100, 1, 0, 0, 1)
    assert sent[12:] == encoded(NAME) + b"\0\1\0\1" + b"\0" + struct.pack(">HHIH", dns.OPT, 1232, 0, 0)


@pytest.mark.parametrize("kind", [16, 255, 10, 15, 2, 33, 12, 35, 65399])
async def test_types_that_carry_words_are_refused(kind: int) -> None:
    server = Server(a(PUBLIC))
    rig = Rig(server, f"https:{NAME}")
    assert await rig.ask(NAME, kind) == (dns.REFUSED, [])
    assert not server.asked


@pytest.mark.parametrize("kind", [28, 64, 65])
async def test_there_is_no_ipv6_and_nobody_is_asked_for_it(kind: int) -> None:
    server = Server(a(PUBLIC))
    assert await Rig(server, f"https:{NAME}").ask(NAME, kind) == (dns.NOERROR, [])
    assert not server.asked


@pytest.mark.parametrize(
    "address",
    ["10.1.2.3", "127.0.0.1", "169.254.169.254", "169.254.170.2", "192.168.1.1", "172.16.0.1", "100.64.0.1", "100.100.100.200", "0.0.0.0",
     "168.63.129.16", "224.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.0.192"],
)  # fmt: skip
async def test_answers_that_point_inside_are_dropped(address: str) -> None:
    """Else the owner of a name could have a guest speak to the host's network (DNS rebinding)."""
    rig = Rig(Server(a(address), a(PUBLIC)), f"https:{NAME}")
    assert await rig.ask(NAME) == (dns.NOERROR, [PUBLIC])
    assert rig.notes[0] == (NAME, "no address of the internet", address)
    assert not await rig.names.is_address(NAME, ipaddress.IPv4Address(address))


async def test_private_answers_in_the_connectors_own_networks_are_its_own() -> None:
    rig = Rig(Server(a(PRIVATE), a("10.8.0.1")), f"tcp:{NAME}:5432", networks=("10.9.0.0/16",))
    assert await rig.ask(NAME) == (dns.NOERROR, [PRIVATE])


async def test_an_alias_is_followed_and_not_told() -> None:
    alias = "edge.cdn.example"
    server = Server(
        record(b"\xc0\x0c", dns.CNAME, encoded(alias)), a(PUBLIC, encoded(alias), 30), a("198.51.100.9", encoded("other.example"))
    )
    assert await Rig(server, f"https:{NAME}").ask(NAME) == (dns.NOERROR, [PUBLIC])


async def test_many_addresses_fit_a_datagram() -> None:
    server = Server(*(a(f"198.51.100.{number}") for number in range(100)))
    code, addresses = await Rig(server, f"https:{NAME}").ask(NAME)
    assert code == dns.NOERROR and len(addresses) == dns.MOST_ADDRESSES


@pytest.mark.parametrize("code", [dns.NXDOMAIN, dns.SERVFAIL])
async def test_codes_are_passed_on(code: int) -> None:
    assert await Rig(Server(code=code), f"https:{NAME}").ask(NAME) == (code, [])


async def test_answers_are_kept_and_asked_for_once_at_a_time() -> None:
    server = Server(a(PUBLIC, seconds=5))
    rig = Rig(server, f"https:{NAME}")
    await asyncio.gather(*(rig.ask(NAME) for _ in range(50)))
    rig.now += 59
    await rig.ask(NAME)
    assert len(server.asked) == 1
    rig.now += 2
    await rig.ask(NAME)
    assert len(server.asked) == 2
    server.records = (a("198.51.100.8", seconds=1 << 31),)
    rig.now += 61
    assert await rig.ask(NAME) == (dns.NOERROR, ["198.51.100.8"])
    rig.now += 3601
    await rig.ask(NAME)
    assert len(server.asked) == 4, "nothing is kept for longer than an hour"


async def test_what_was_answered_holds_for_an_hour() -> None:
    """Names of large services have other addresses each minute, and clients keep the ones that they have."""
    server = Server(a(PUBLIC))
    rig = Rig(server, f"https:{NAME}")
    old, new = ipaddress.IPv4Address(PUBLIC), ipaddress.IPv4Address("198.51.100.8")
    assert await rig.names.is_address(NAME, old) and not await rig.names.is_address(NAME, new)
    server.records = (a(str(new)),)
    rig.now += 3000
    assert await rig.ask(NAME) == (dns.NOERROR, [str(new)])
    assert await rig.names.is_address(NAME, old) and await rig.names.is_address(NAME, new)
    rig.now += 601
    assert not await rig.names.is_address(NAME, old) and await rig.names.is_address(NAME, new)
    server.records, server.code = (), dns.SERVFAIL
    rig.now += 600
    assert await rig.ask(NAME) == (dns.SERVFAIL, [])
    assert await rig.names.is_address(NAME, new), "servers that fail close no connection"


async def test_addresses_of_a_name_are_bounded() -> None:
    server = Server()
    rig = Rig(server, f"https:{NAME}")
    for number in range(200):
        server.records = (a(f"198.51.100.{number}", seconds=5),)
        rig.now += 61
        await rig.ask(NAME)
    assert len(rig.names._kept[NAME].answered) <= 64
    assert await rig.names.is_address(NAME, ipaddress.IPv4Address("198.51.100.199"))


async def test_what_goes_out_below_a_wildcard_is_bounded() -> None:
    server = Server(a(PUBLIC))
    rig = Rig(server, "https:*.example.org")
    codes = [(await rig.ask(f"w{number}.example.org"))[0] for number in range(300)]
    assert codes == [dns.NOERROR] * 256 + [dns.REFUSED] * 44 and len(server.asked) == 256
    assert await rig.ask("w3.example.org") == (dns.NOERROR, [PUBLIC]), "what is known is told"
    assert await rig.ask("a.b.example.org") == (dns.REFUSED, [])
    assert len(rig.names._kept) <= 1024


@pytest.mark.parametrize("late", [b"", b"\0" * 11, b"\0" * 12])
async def test_what_is_no_answer_is_a_failure(late: bytes) -> None:
    async def server(data: bytes) -> bytes | None:
        return late

    rules = EgressRules(False, [], [], [f"https:{NAME}"])
    names = AllowedNames(rules, server, lambda *note: None, lambda: 0.0)
    assert (await names.resolve(NAME)).code == dns.SERVFAIL


async def test_anothers_answer_is_none() -> None:
    async def server(data: bytes) -> bytes | None:
        return answer(dns.make_question(int.from_bytes(data[:2], "big"), "other.example.org"), a(PUBLIC))

    names = AllowedNames(EgressRules(False, [], [], [f"https:{NAME}"]), server, lambda *note: None, lambda: 0.0)
    assert (await names.resolve(NAME)).addresses == ()


@given(st.binary(min_size=12, max_size=400))
def test_any_question_is_read_or_refused(data: bytes) -> None:
    try:
        found = dns.read_question(data)
    except dns.Malformed:
        return
    assert len(found.name) <= 4 * 255 and dns.read_question(data) == found


@given(st.binary(max_size=600), st.binary(max_size=100))
def test_any_answer_is_read_or_refused(data: bytes, tail: bytes) -> None:
    asked = dns.make_question(7, NAME)
    for one in (data, answer(asked) + tail, answer(asked, a(PUBLIC), a(PUBLIC))[: len(data)], answer(asked, data, tail)):
        try:
            found = dns.read_answer(one, 7, NAME)
        except dns.Malformed:
            continue
        assert len(found.addresses) <= 128


def test_names_that_point_at_themselves_end() -> None:
    asked = dns.make_question(7, NAME)
    with pytest.raises(dns.Malformed):
        dns.read_answer(answer(asked, a(PUBLIC, b"\xc0\x21\xc0\x21")), 7, NAME)
    loop = answer(asked, record(b"\xc0\x0c", dns.CNAME, encoded("b.example")), record(encoded("b.example"), dns.CNAME, b"\xc0\x0c"))
    assert dns.read_answer(loop, 7, NAME).addresses == ()


async def test_what_is_no_question_is_told_so() -> None:
    names = Rig(Server(), f"https:{NAME}").names
    for data in (bytes(12), question("a" * 64 + ".org")[:20], question(NAME)[:-1]):
        assert (await names.reply(data))[3] & 15 == dns.FORMERR


# ---- the rules ----


@pytest.mark.parametrize(
    ("rule", "scheme", "name", "port", "takes"),
    [
        ("https:api.github.com", "https", "api.github.com", 443, True),
        ("https:api.github.com", "http", "api.github.com", 443, False),
        ("https:api.github.com", "https", "api.github.com", 444, False),
        ("https:api.github.com", "https", "github.com", 443, False),
        ("https:api.github.com", "https", "a.api.github.com", 443, False),
        ("https:*.example.org:8443", "https", "a.example.org", 8443, True),
        ("https:*.example.org", "https", "example.org", 443, False),
        ("https:*.example.org", "https", ".example.org", 443, False),
        ("https:*.example.org", "https", "a.b.example.org", 443, False),
        ("https:*.example.org", "https", "aexample.org", 443, False),
        ("http:deb.example.org", "http", "deb.example.org", 80, True),
        ("tcp:db.example.org:5432", "tcp", "db.example.org", 5432, True),
    ],
)
def test_what_a_rule_takes(rule: str, scheme: str, name: str, port: int, takes: bool) -> None:
    assert re.match(HOST_RULE, rule)
    assert AllowList([rule]).takes(scheme, name, port) is takes
    assert AllowList([rule]).names(name) is (takes or (name == "api.github.com"))


@pytest.mark.parametrize(
    "rule",
    ["https:*.org", "https:1.2.3.4", "https:localhost", "tcp:*.example.org:5", "tcp:example.org", "https:*.*.example.org", "udp:example.org:53",
     "https:example.org.", "https:-a.example.org", "https:a..example.org", "https:example.org:", "https:example.org/x", "https:API.example.org",
     "https:example.org:0", "https:example.org:65536", f"https:{'a' * 64}.org", f"https:{'a.' * 130}org", "https:example.org\n"],
)  # fmt: skip
def test_what_is_no_rule_is_refused_at_the_start(rule: str) -> None:
    with pytest.raises(ValueError, match="sg-1"):
        Egress(security_groups={"sg-1": [rule]})


def test_groups_have_ports_and_hosts() -> None:
    entries = ["tcp:443", "https:api.github.com", "https:*.example.org", "http:deb.example.org:8080", "tcp:db.example.org:5432"]
    assert Egress(security_groups={"sg-1": entries}).security_groups["sg-1"] == entries
    assert [parse(entry).port for entry in entries[1:]] == [443, 443, 8080, 5432]


# ---- the audit ----


def lines(audit: EgressAudit, after: int = 0) -> list[dict[str, object]]:
    return [json.loads(line) for line in audit.read("1", "vm-1", after)]


def test_each_decision_is_a_line(tmp_path: Path) -> None:
    audit = EgressAudit(tmp_path / "egress", lambda: 1000.5, lambda: 0.0)
    one = audit.of("1", "vm-1")
    one.name("evil.example", "no group names it", "")
    one.name(NAME, "", PUBLIC)
    one.connection(NAME, PUBLIC, 443, ALLOWED, "")
    one.connection(NAME, PUBLIC, 443, ENDED, "", 10, 20)
    found = lines(audit)
    assert [(line["what"], line["name"], line["verdict"], line["reason"]) for line in found] == [
        ("name", "evil.example", REFUSED, "no group names it"), ("name", NAME, ALLOWED, ""),
        ("connection", NAME, ALLOWED, ""), ("connection", NAME, ENDED, ""),
    ]  # fmt: skip
    assert (found[3]["sent"], found[3]["received"], found[0]["time"]) == (10, 20, "1970-01-01T00:16:40.500Z")
    assert lines(audit, int(str(found[1]["order"]))) == found[2:]
    assert audit.has("1") and not audit.has("2") and not audit.read("2", "vm-1", 0)


def test_the_audit_is_bounded_and_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress_audit, "_FILE_BYTES", 20_000)
    now = [0.0]
    audit = EgressAudit(tmp_path, lambda: 1000.0 + now[0], lambda: now[0])
    one = audit.of("1", "vm-1")
    for number in range(300):
        one.connection(f"n{number}", PUBLIC, 443, REFUSED, "x")
    assert lines(audit)[-1]["name"] == "n199"
    now[0] = 1.0
    one.connection("after", PUBLIC, 443, REFUSED, "x")
    assert lines(audit)[-1]["name"] == "after" and lines(audit)[-1]["untold"] == 100
    for step in range(1000):
        now[0] += 1.0
        one.connection(f"m{step}", PUBLIC, 443, REFUSED, "x")
    assert sum(path.stat().st_size for path in (tmp_path / "1").iterdir()) <= 40_000
    assert lines(audit)[-1]["name"] == "m999"


def test_a_name_that_is_asked_again_and_again_is_one_line(tmp_path: Path) -> None:
    now = [0.0]
    audit = EgressAudit(tmp_path, lambda: 1000.0, lambda: now[0])
    one = audit.of("1", "vm-1")
    for _ in range(10):
        one.name("evil.example", "no group names it", "")
    assert len(lines(audit)) == 1
    now[0] = 61.0
    one.name("evil.example", "no group names it", "")
    assert len(lines(audit)) == 2
    for number in range(1000):
        one.name(f"x{number}", "no group names it", "")
    assert len(one._told) <= 256


def test_a_disk_that_is_full_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    audit = EgressAudit(tmp_path / "egress", lambda: 1000.0, lambda: 0.0)
    (tmp_path / "egress").write_text("in the way")
    one = audit.of("1", "vm-1")
    one.connection(NAME, PUBLIC, 443, ALLOWED, "")
    (tmp_path / "egress").unlink()
    one.connection(NAME, PUBLIC, 443, ALLOWED, "")
    assert [line["untold"] for line in lines(audit)] == [1]


def test_old_files_go_and_an_accounts_oldest(tmp_path: Path) -> None:
    now = [1000.0]
    audit = EgressAudit(tmp_path, lambda: now[0], lambda: 0.0)
    for number in range(3):
        audit.of("1", f"vm-{number}").connection(NAME, PUBLIC, 443, ALLOWED, "")
    size = (tmp_path / "1/vm-0.jsonl").stat().st_size
    now[0] = (tmp_path / "1/vm-0.jsonl").stat().st_mtime
    audit.drop_old(60.0, 2.5 * size)
    assert len(list((tmp_path / "1").iterdir())) == 2
    now[0] += 120
    audit.drop_old(60.0, 1e9)
    assert not audit.has("1")
