"""Addresses of links: allocated, never counted; and what can be wrong with the pool that they come from."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from gateway.config import ConfigError, load
from gateway.messages import EgressRules, Shape
from vmm import sandboxes
from vmm.cgroups import Cgroups
from vmm.egress import Pairs, accepts_of, named_rules
from vmm.errors import Unavailable
from vmm.sandboxes import SandboxAllocator

SHAPE = Shape(512, 1, 1 << 30, "tcg", 512)


def test_a_link_that_lives_on_keeps_its_addresses_to_itself() -> None:
    """They were counted: the 32,768th link after it had the same ones, and the answers to that went to the old one."""
    pairs, chance = Pairs(8), random.Random(1)
    pairs.keep("", 3)
    old, _ = pairs.take("old")
    held = {"old": old}
    for number in range(500):
        if len(held) == 7 or (len(held) > 1 and chance.random() < 0.5):
            gone = chance.choice([name for name in held if name != "old"])
            del held[gone]
            pairs.give_back(gone)
        else:
            held[f"l{number}"], _ = pairs.take(f"l{number}")
        assert len(set(held.values())) == len(held) and 3 not in held.values()


def test_what_was_given_back_longest_ago_is_given_first_and_says_whose_it_was() -> None:
    """A namespace may live on in somebody's socket: what is left of it has to go before its addresses are another one's."""
    pairs = Pairs(3)
    for name in "abc":
        assert pairs.take(name)[1] is None
    pairs.give_back("b")
    pairs.give_back("a")
    assert pairs.take("d") == (1, "b") and pairs.take("e") == (0, "a")
    pairs.give_back("nobody")
    with pytest.raises(Unavailable, match=r"all 3 pairs of egress\.pool's addresses are in use: end microVMs, or choose a larger pool"):
        pairs.take("f")
    pairs.give_back("d")
    assert pairs.take("f") == (1, "d")


def test_addresses_of_links_that_an_earlier_daemon_made_are_theirs() -> None:
    pairs = Pairs(3)
    pairs.keep("running", 0)
    assert [pairs.take(name)[0] for name in "ab"] == [1, 2]
    pairs.give_back("running")
    assert pairs.take("c") == (0, "running")


@pytest.mark.parametrize(
    ("pool", "says"),
    [
        ("nonsense", "egress.pool: .*nonsense is no IPv4 network"), ("100.64.0.1/16", "egress.pool: .*100.64.0.1/16 is no IPv4 network"),
        ("fd00::/64", "is no IPv4 network"), ("100.64.0.0/31", "egress.pool: .*has 2 addresses: 4 at least"),
        ("169.254.0.0/17", "overlaps 169.254.0.0/16"), ("224.0.0.0/8", "overlaps 224.0.0.0/3"), ("127.0.0.0/24", "overlaps 127.0.0.0/8"),
        ("10.0.0.0/7", "egress: .*10.0.0.0/8 of egress.subnets subnet-a lies in egress.pool 10.0.0.0/7"),
    ],
)  # fmt: skip
def test_a_pool_that_is_none_is_said_in_one_line(tmp_path: Path, pool: str, says: str) -> None:
    (tmp_path / "torpor.toml").write_text(f'[egress]\npool = "{pool}"\n[egress.subnets]\nsubnet-a = ["10.0.0.0/8"]\n')
    with pytest.raises(ConfigError, match=says) as raised:
        load(root=tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("egress", "says"),
    [
        ({"subnets": {"subnet-a": ["10.0.0.1/8"]}}, r"egress.subnets: .*subnet-a: 10.0.0.1/8 is no IPv4 network"),
        ({"security_groups": {"sg-a": ["443"]}}, r"egress.security_groups: .*sg-a: 443 is not of the form tcp:443 or udp:53-60"),
        ({"security_groups": {"sg-a": ["tcp:99999"]}}, r"tcp:99999 is not of the form"),
        ({"security_groups": {"sg-a": ["udp:60-53"]}}, r"udp:60-53 is not of the form"),
    ],
)
def test_what_a_connector_may_mean_is_checked_at_the_start(tmp_path: Path, egress: dict[str, object], says: str) -> None:
    """And not at a microVM's launch."""
    with pytest.raises(ConfigError, match=says):
        load(root=tmp_path, egress=egress)
    load(
        root=tmp_path,
        egress={"subnets": {"subnet-a": ["10.0.0.0/8"]}, "security_groups": {"sg-a": ["tcp:443", "udp:53-60", "tcp:1-65535"]}},
    )


# ---- user ids ----


def test_when_all_user_ids_are_in_use_the_next_hypervisor_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a StopIteration, which told nobody anything, and left a directory behind."""
    monkeypatch.setattr(sandboxes, "_USERS", 2)
    monkeypatch.setattr(Cgroups, "create", lambda *_: None)
    one = SandboxAllocator(tmp_path, Cgroups("links-unit", tmp_path), 7000)
    made = [one.allocate(SHAPE) for _ in range(2)]
    assert [sandbox.uid for sandbox in made] == [7000, 7001]
    with pytest.raises(Unavailable, match=r"all 2 user ids of hypervisors \(users\.first\) are in use"):
        one.allocate(SHAPE)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_sandbox_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    one = SandboxAllocator(tmp_path, Cgroups("links-unit", tmp_path), 7000)
    monkeypatch.setattr(one._cgroups, "create", full)
    with pytest.raises(OSError, match="No space"):
        one.allocate(SHAPE)
    assert not list(tmp_path.iterdir()) and not one._uids


HOSTS = ["https:api.example.org", "tcp:db.example.org:5432"]


@pytest.mark.parametrize(
    ("rules", "matches"),
    [
        (EgressRules(False, ["10.0.0.0/8"], []), ["ip daddr 10.0.0.0/8 tcp dport 1-65535"]),
        (EgressRules(False, ["10.0.0.0/8"], ["udp:53-60"]), ["ip daddr 10.0.0.0/8 udp dport 53-60"]),
        (EgressRules(False, ["10.0.0.0/8"], [], HOSTS), []),
        (EgressRules(False, ["10.0.0.0/8"], ["tcp:443"], HOSTS), ["ip daddr 10.0.0.0/8 tcp dport 443"]),
        (EgressRules(False, [], [], HOSTS), []),
    ],
)
def test_groups_that_name_hosts_alone_open_no_port_of_a_subnet(rules: EgressRules, matches: list[str]) -> None:
    assert accepts_of(rules) == matches


def test_ports_of_hosts_lead_to_the_relay() -> None:
    text = named_rules(
        "tap0", "169.254.77.2", ("169.254.77.1",), EgressRules(False, [], [], [*HOSTS, "http:a.example.org"]), ["10.0.0.0/8"]
    )
    assert "tcp dport { 80, 443, 5432 } redirect to :3129" in text
    assert named_rules("tap0", "169.254.77.2", ("169.254.77.1",), EgressRules(False, ["10.0.0.0/8"]), ["10.0.0.0/8"]) == ""
