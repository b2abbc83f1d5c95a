"""CloudWatch Logs' read calls, served from the embedded log store (Logs_20140328, JSON 1.1).

What `aws logs tail`, get-log-events and filter-log-events need. Groups are their account's.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from gateway.accounts.model import Caller
from gateway.accounts.policy import Decision
from gateway.executors import Pool
from gateway.sessions.logs import GROUP_PREFIX, LogEvent, LogStore

from .errors import AccessDenied, ApiError

_ANNOUNCED_PREFIX = "/aws/lambda/microvms/"  # the announcement's spelling of the group's name: the same streams
_MOST_EVENTS = 10_000
_ANSWER_BYTES, _EVENT_BYTES = 1 << 20, 26
_FOREVER = 1 << 62
_READS = Pool("log reads", 2, 300.0)  # a stream has 64 MiB
T = TypeVar("T")


def _spellings(group: str) -> set[str]:
    """Returns the names of one group: a policy that denies either denies it, and one that allows either allows it."""
    real, announced = GROUP_PREFIX, _ANNOUNCED_PREFIX
    if group.startswith(announced):
        return {group, real + group.removeprefix(announced)}
    return {group, announced + group.removeprefix(real)} if group.startswith(real) else {group}


class LogsNotFound(ApiError):
    kind, status = "ResourceNotFoundException", 400


class InvalidParameter(ApiError):
    kind, status = "InvalidParameterException", 400


class UnknownOperation(ApiError):
    kind, status = "UnknownOperationException", 400


class Logs:
    target_prefix, source = "Logs_20140328", "logs.amazonaws.com"

    def __init__(self, store: LogStore, region: str) -> None:
        self._store = store
        self._region = region
        self._handlers: dict[str, Callable[[str, dict[str, Any]], dict[str, Any]]] = {
            "DescribeLogGroups": self._describe_log_groups,
            "DescribeLogStreams": self._describe_log_streams,
            "GetLogEvents": self._get_log_events,
            "FilterLogEvents": self._filter_log_events,
        }

    async def answer(self, caller: Caller, name: str, call: dict[str, Any]) -> dict[str, Any]:
        """Raises ApiError."""
        handler = self._handlers.get(name)
        if handler is None:
            raise UnknownOperation(f"{name} is not served here: only {', '.join(self._handlers)}")
        group = "*" if name == "DescribeLogGroups" else _text(call, "logGroupName") or _text(call, "logGroupIdentifier")
        asked = group.rpartition("log-group:")[2].removesuffix(":*")
        arn = self._arn(caller.account, asked)
        judged = {caller.policy.decide(f"logs:{name}", self._arn(caller.account, one), caller.context()) for one in _spellings(asked)}
        if Decision.EXPLICIT_DENY in judged or Decision.ALLOW not in judged:
            raise AccessDenied(f"User: {caller.arn} is not authorized to perform: logs:{name} on resource: {arn}")
        return await _READS.run(handler, caller.account, call)

    def _arn(self, account: str, group: str) -> str:
        return f"arn:aws:logs:{self._region}:{account}:log-group:{group}:*"

    def _group(self, account: str, call: dict[str, Any]) -> str:
        group = _text(call, "logGroupName") or _text(call, "logGroupIdentifier").rpartition("log-group:")[2].removesuffix(":*")
        known = self._store.groups(account)
        if group not in known and group.startswith(_ANNOUNCED_PREFIX):
            group = GROUP_PREFIX + group.removeprefix(_ANNOUNCED_PREFIX)
        if group not in known:
            raise LogsNotFound("The specified log group does not exist.")
        return group

    # ---- groups and streams ----

    def _describe_log_groups(self, account: str, call: dict[str, Any]) -> dict[str, Any]:
        prefix, pattern = _text(call, "logGroupNamePrefix"), _text(call, "logGroupNamePattern")
        wanted = _texts(call, "logGroupIdentifiers")
        names = [name for name in self._store.groups(account) if name.startswith(prefix) and pattern in name]
        if wanted is not None:
            asked = {one.rpartition("log-group:")[2].removesuffix(":*") for one in wanted}
            names = [name for name in names if name in asked]
        page, token = _page(names, lambda name: name, call, 50)
        groups = []
        for name in page:
            streams = [self._store.facts(account, name, stream) for stream in self._store.streams(account, name)]
            groups.append({
                "logGroupName": name, "arn": self._arn(account, name), "storedBytes": sum(stream.stored_bytes for stream in streams),
                "creationTime": min((stream.first for stream in streams), default=0), "metricFilterCount": 0,
            })  # fmt: skip
        return {"logGroups": groups, **token}

    def _describe_log_streams(self, account: str, call: dict[str, Any]) -> dict[str, Any]:
        group, prefix = self._group(account, call), _text(call, "logStreamNamePrefix")
        by_time = call.get("orderBy") == "LastEventTime"
        facts = {name: self._store.facts(account, group, name) for name in self._store.streams(account, group) if name.startswith(prefix)}
        names = sorted(facts, key=lambda name: (facts[name].last, name) if by_time else (0, name), reverse=call.get("descending") is True)
        places = {name: f"{at:09d}" for at, name in enumerate(names)}
        page, token = _page(names, lambda name: places[name], call, 50)
        streams = [
            {
                "logStreamName": name, "creationTime": facts[name].first, "firstEventTimestamp": facts[name].first,
                "lastEventTimestamp": facts[name].last, "lastIngestionTime": facts[name].last, "storedBytes": facts[name].stored_bytes,
                "arn": f"{self._arn(account, group)[:-1]}log-stream:{name}",
            }
            for name in page
        ]  # fmt: skip
        return {"logStreams": streams, **token}

    # ---- events ----

    def _get_log_events(self, account: str, call: dict[str, Any]) -> dict[str, Any]:
        """Tokens are positions in the stream, so that a follower asks for what is new only."""
        group, stream = self._group(account, call), _text(call, "logStreamName")
        if stream not in self._store.streams(account, group):
            raise LogsNotFound("The specified log stream does not exist.")
        first, last = _span(call)
        limit = _limit(call, _MOST_EVENTS)
        way, position = _position(_text(call, "nextToken") or ("f/0" if call.get("startFromHead") is True else f"b/{_FOREVER}"))
        end = self._store.facts(account, group, stream).end
        read = self._store.events if way == "f" else self._store.events_before
        found = ((at, event) for at, event in read(account, group, stream, position) if first <= event.t < last)
        events = list(_one_answer(found, limit, lambda one: one[1]))
        if way == "b":
            events.reverse()
        after = events[-1][0] + 1 if events else min(position, end)
        return {
            "events": [{"timestamp": event.t, "message": event.m, "ingestionTime": event.t} for _, event in events],
            "nextForwardToken": f"f/{after}",
            "nextBackwardToken": f"b/{events[0][0] if events else min(position, after)}",
        }

    def _filter_log_events(self, account: str, call: dict[str, Any]) -> dict[str, Any]:
        group, matches = self._group(account, call), pattern(_text(call, "filterPattern"))
        wanted, prefix = _texts(call, "logStreamNames"), _text(call, "logStreamNamePrefix")
        first, last = _span(call)
        after, limit = _text(call, "nextToken"), _limit(call, _MOST_EVENTS)
        streams = [
            one for one in self._store.streams(account, group) if one.startswith(prefix) and (wanted is None or one in wanted)
        ]  # fmt: skip
        found = (
            (key, stream, at, event)
            for stream in streams
            for at, event in self._store.events(account, group, stream, 0)
            if first <= event.t < last and matches(event.m) and (key := f"{event.t:015d}/{at:016d}/{stream}") > after
        )
        first_of_all = heapq.nsmallest(limit + 1, found, key=lambda one: one[0])
        page = list(_one_answer(first_of_all, limit, lambda one: one[3]))
        token = {"nextToken": page[-1][0]} if len(page) < len(first_of_all) else {}
        return {
            "events": [
                {
                    "logStreamName": stream, "timestamp": event.t, "message": event.m, "ingestionTime": event.t,
                    "eventId": f"{event.t:014d}{at:016d}{stream}",
                }
                for _, stream, at, event in page
            ],
            "searchedLogStreams": [],
            **token,
        }  # fmt: skip


def _one_answer(found: Iterable[T], limit: int, event_of: Callable[[T], LogEvent]) -> Iterator[T]:
    """Returns at most `limit` of them, and a MiB, as GetLogEvents bounds its answers; the first in any case."""
    size = 0
    for one in itertools.islice(found, limit):
        size += len(event_of(one).m.encode()) + _EVENT_BYTES
        if size > _ANSWER_BYTES and size > len(event_of(one).m.encode()) + _EVENT_BYTES:
            return
        yield one


def _text(call: dict[str, Any], name: str) -> str:
    value = call.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidParameter(f"{name} must be a string.")
    return value or ""


def _texts(call: dict[str, Any], name: str) -> list[str] | None:
    value = call.get(name)
    if value is not None and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise InvalidParameter(f"{name} must be a list of strings.")
    return value


def _number(call: dict[str, Any], name: str, otherwise: int) -> int:
    value = call.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise InvalidParameter(f"{name} must be a number that is not negative.")
    return otherwise if value is None else value


def _limit(call: dict[str, Any], most: int) -> int:
    limit = _number(call, "limit", most)
    if not 1 <= limit <= most:
        raise InvalidParameter(f"limit must be between 1 and {most}.")
    return limit


def _span(call: dict[str, Any]) -> tuple[int, int]:
    return _number(call, "startTime", 0), _number(call, "endTime", _FOREVER)


def _position(token: str) -> tuple[str, int]:
    match = re.fullmatch(r"([fb])/([0-9]{1,19})", token)
    if match is None:
        raise InvalidParameter("The specified nextToken is invalid.")
    return match[1], int(match[2])


def _page(items: list[Any], key: Callable[[Any], str], call: dict[str, Any], most: int) -> tuple[list[Any], dict[str, str]]:
    """Returns one page and the member that names the next: tokens are the last item's key."""
    after = _text(call, "nextToken")
    first = bisect.bisect_right([key(item) for item in items], after) if after else 0
    limit = _limit(call, most)
    page = items[first : first + limit]
    return page, ({"nextToken": key(page[-1])} if page and len(items) > first + limit else {})


def pattern(text: str) -> Callable[[str], bool]:
    """A filter pattern of terms: all of them, `-term` not, any of those with `?`; quotes keep spaces together.

    Raises InvalidParameter for the JSON and space-delimited forms, which are not served.
    """
    if text.strip().startswith(("{", "[")):
        raise InvalidParameter("Only filter patterns of terms are served here.")
    terms = [(mark, quoted or plain) for mark, quoted, plain in re.findall(r'([-?]?)(?:"([^"]*)"|(\S+))', text)]
    every = [term for mark, term in terms if mark == ""]
    none = [term for mark, term in terms if mark == "-"]
    some = [term for mark, term in terms if mark == "?"]
    return lambda message: (
        all(term in message for term in every)
        and not any(term in message for term in none)
        and (not some or any(term in message for term in some))
    )
