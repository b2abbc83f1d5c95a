"""The resolver of a microVM whose connector is an allow-list: it answers the names on that list, and refuses all others.

A refusal is REFUSED, as where there is no way out at all: the name may well exist (NXDOMAIN would be a lie, which clients keep), and that
the answer is a matter of policy is what this code says (RFC 1035, 4.1.1). Nobody outside hears of a name that is refused.

Answers that are no address of the internet are dropped, but for those in the connector's own networks: a name's owner could otherwise
point at the host's network (DNS rebinding). What was answered is kept: the proxy lets connections to it through, and no others.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gateway.addresses import is_internet, lies_in
from gateway.messages import EgressRules
from gateway.sessions.allowance import Allowance

from . import dns
from .allow_list import AllowList

_LEAST_SECONDS, _MOST_SECONDS = 60, 3600  # an answer is kept
_FAILED_SECONDS = 5
_KEPT = 1024  # names
_ANSWERED = 64  # addresses of a name
# Names below a wildcard are in part a guest's own words: so many may be carried out at once, and so many an hour.
_WILD_BURST, _WILD_RATE = 256, 256 / 3600

Ask = Callable[[bytes], Awaitable[bytes | None]]
Note = Callable[[str, str, str], None]  # (name, what was refused or "", addresses)


@dataclass(frozen=True)
class _Kept:
    """`answered`: addresses of the name, also earlier ones, with when they are no more: clients keep them for longer than they are told."""

    answer: dns.Answer
    until: float
    answered: dict[ipaddress.IPv4Address, float]


class AllowedNames:
    """One microVM's. `ask` carries a question to the host's servers; `note(name, reason, addresses)` is told of each decision."""

    def __init__(self, rules: EgressRules, ask: Ask, note: Note, clock: Callable[[], float] = time.monotonic) -> None:
        self.allow = AllowList(rules.hosts)
        self._networks = [ipaddress.IPv4Network(one) for one in rules.networks]
        self._ask = ask
        self._note = note
        self._clock = clock
        self._kept: dict[str, _Kept] = {}
        self._asking: dict[str, asyncio.Task[dns.Answer]] = {}
        self._wild = Allowance(_WILD_BURST, _WILD_RATE, clock)

    async def reply(self, data: bytes) -> bytes:
        """Returns the answer to a guest's question."""
        try:
            question = dns.read_question(data)
        except dns.Malformed:
            return data[:2] + bytes([0x80 | data[2] & 0x01, dns.FORMERR]) + bytes(8)
        if not self.allow.names(question.name):
            self._note(question.name, "no group names it", "")
            return dns.make_answer(question, dns.REFUSED)
        if not question.is_internet or question.kind not in (dns.A, *dns.WITHOUT_ANSWER):
            self._note(question.name, f"a question of type {question.kind}", "")
            return dns.make_answer(question, dns.REFUSED)
        if question.kind != dns.A:
            return dns.make_answer(question, dns.NOERROR)
        answer = await self.resolve(question.name)
        return dns.make_answer(question, answer.code, answer.addresses, answer.seconds)

    async def resolve(self, name: str) -> dns.Answer:
        """Returns what the host's servers say of a name that is allowed, as far as it may be reached."""
        kept = self._kept.get(name)
        if kept is not None and kept.until > self._clock():
            return kept.answer
        task = self._asking.get(name)
        if task is None:
            if self.allow.is_wild(name) and not self._wild.take(1):
                self._note(name, "too many names below a wildcard", "")
                return dns.Answer(dns.REFUSED)
            task = self._asking[name] = asyncio.get_running_loop().create_task(self._resolve(name))
            task.add_done_callback(lambda _: self._asking.pop(name, None))
        return await asyncio.shield(task)

    async def is_address(self, name: str, address: ipaddress.IPv4Address) -> bool:
        """Whether the resolver has said so of a name that is allowed, within the last hour, or says so now."""
        return self._has_answered(name, address) or address in (await self.resolve(name)).addresses

    def _has_answered(self, name: str, address: ipaddress.IPv4Address) -> bool:
        kept = self._kept.get(name)
        return kept is not None and kept.answered.get(address, 0.0) > self._clock()

    async def _resolve(self, name: str) -> dns.Answer:
        identifier = secrets.randbelow(1 << 16)
        try:
            data = await self._ask(dns.make_question(identifier, name))
            answer = dns.read_answer(data, identifier, name) if data is not None else dns.Answer(dns.SERVFAIL)
        except dns.Malformed:
            answer = dns.Answer(dns.SERVFAIL)
        reached = tuple(one for one in answer.addresses if is_internet(one) or lies_in(one, self._networks))[: dns.MOST_ADDRESSES]
        if dropped := [str(one) for one in answer.addresses if one not in reached and not is_internet(one)]:
            self._note(name, "no address of the internet", " ".join(dropped[: dns.MOST_ADDRESSES]))
        if reached:
            self._note(name, "", " ".join(map(str, reached)))
        seconds = min(max(answer.seconds, _LEAST_SECONDS), _MOST_SECONDS) if answer.code in (dns.NOERROR, dns.NXDOMAIN) else _FAILED_SECONDS
        made = dns.Answer(answer.code, reached, seconds)
        self._keep(name, made, seconds)
        return made

    def _keep(self, name: str, answer: dns.Answer, seconds: float) -> None:
        before, now = self._kept.pop(name, None), self._clock()
        while len(self._kept) >= _KEPT:
            self._kept.pop(next(iter(self._kept)))
        earlier = {one: until for one, until in before.answered.items() if until > now} if before is not None else {}
        answered = earlier | dict.fromkeys(answer.addresses, now + _MOST_SECONDS)
        self._kept[name] = _Kept(answer, now + seconds, dict(list(answered.items())[-_ANSWERED:]))

    def close(self) -> None:
        for task in self._asking.values():
            task.cancel()
