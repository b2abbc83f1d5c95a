"""Links of a small pool, in namespaces of this test's own: each has addresses of its own, also after a restart, also beside what is left."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from namespaces import Namespace, namespace
from service import until

from gateway.config import Egress
from gateway.messages import EgressRules
from vmm import egress
from vmm.errors import Unavailable
from vmm.namespaces import destroy_namespace, inside
from vmm.network import Link, Network

pytestmark = pytest.mark.vm
POOL = "100.64.0.0/29"  # four pairs: the veth to the outside, and three links


@pytest.fixture
def outside() -> Iterator[Namespace]:
    with namespace() as one:
        one.ip("link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
        one.ip("link", "set", "lan1", "up")
        one.ip("link", "set", "lan0", "up")
        one.ip("addr", "add", "198.51.100.1/24", "dev", "lan0")
        yield one


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/run") as name:
        yield Path(name)
        for path in (*(Path(name) / "netns").glob("*"), Path(name) / "uplink"):
            destroy_namespace(path)


def network(directory: Path, outside: Namespace, pool: str = POOL) -> Network:
    return Network(directory / "netns", Egress(uplink=outside.path, pool=pool), "links-test")


def addresses(path: Path) -> dict[str, list[str]]:
    def listed() -> Any:
        return json.loads(os.popen("ip -j -4 address show up").read())

    return {one["ifname"]: [address["local"] for address in one["addr_info"]] for one in inside(path, listed) if one}


def inner(link: Link) -> str:
    return addresses(link.path)["up0"][0]


def rules(link: Link) -> str:
    return str(inside(link.path, lambda: os.popen("nft list ruleset").read()))


async def test_links_have_addresses_of_their_own_whatever_came_before(directory: Path, outside: Namespace) -> None:
    one = network(directory, outside)
    one.start(set(), 0)
    old = await one.take()
    kept = inner(old)
    for _ in range(5):
        link = await one.take()
        assert inner(link) != kept
        await one.release(link)
    held = os.open((last := await one.take()).path, os.O_RDONLY)  # as an edge's socket holds a namespace
    await one.release(last)
    more = [await one.take() for _ in range(2)]
    assert len({kept, *map(inner, more)}) == 3
    with pytest.raises(Unavailable, match=r"all 4 pairs of egress\.pool's addresses are in use"):
        await one.take()
    assert len(list((directory / "netns").iterdir())) == 3, "nothing is left of one that could not be made"
    ends = [address for device, found in addresses(directory / "uplink").items() if device.startswith("vm.") for address in found]
    assert len(ends) == len(set(ends)) == 3, "what was left of the released one has gone"
    os.close(held)

    again = network(directory, outside)  # the daemon is started again; one session lives on
    again.start({old.path}, 0)
    assert inner(old) == kept
    for _ in range(6):
        link = await again.take()
        assert inner(link) != kept
        await again.release(link)
    await again.release(old)
    await one.close(is_empty=False)
    await again.close(is_empty=True)


async def test_a_link_that_goes_while_it_is_removed_stands_in_nobodys_way(
    directory: Path, outside: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes a namespace down when it likes: between the look at its link and the link's removal."""
    one = network(directory, outside)
    one.start(set(), 0)
    links = [await one.take() for _ in range(3)]
    gone = f"vm.{links[0].path.name}"
    await one.release(links[0])
    until(lambda: gone not in addresses(directory / "uplink"))
    seen, exists = iter([True]), egress._exists
    monkeypatch.setattr(egress, "_exists", lambda device: next(seen, False) or exists(device))
    assert inner(await one.take())
    assert next(seen, None) is None, "it was looked for"


async def test_networks_that_the_host_joins_are_closed_to_microvms(directory: Path, outside: Namespace) -> None:
    one = network(directory, outside)
    one.start(set(), 1)
    used = await one.take()
    assert one._filling is not None
    await one._filling
    (waiting,) = one._ready
    assert "198.51.100.0/24" in rules(used) and "203.0.113.0/24" not in rules(waiting)
    outside.ip("addr", "add", "203.0.113.9/24", "dev", "lan0")
    await one.trim()
    await one._filling
    (fresh,) = one._ready
    assert fresh.path != waiting.path and "203.0.113.0/24" in rules(fresh)
    await one.enable_egress(used, EgressRules())  # its session wakes
    assert "203.0.113.0/24" in rules(used)
    await one.trim()
    assert list(one._ready) == [fresh], "nothing has changed"
    await one.release(used)
    await one.close(is_empty=True)


async def test_the_way_out_steps_aside_for_the_hosts_networks(directory: Path, outside: Namespace) -> None:
    outside.ip("addr", "add", "100.64.0.9/29", "dev", "lan0")
    one = network(directory, outside, "100.64.0.0/28")
    one.start(set(), 0)
    found = {name: addresses for name, addresses in addresses_of(outside).items() if name.startswith("tp")}
    assert all(address in ("100.64.0.0", "100.64.0.2", "100.64.0.4", "100.64.0.6") for (address,) in found.values())
    await one.close(is_empty=True)


def addresses_of(outside: Namespace) -> dict[str, list[str]]:
    return addresses(Path(outside.path))
