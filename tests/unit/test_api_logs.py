"""CloudWatch Logs' read calls from the embedded store, by boto3's own paginators and waits."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_rig import ACCOUNT, OTHER, ApiRig
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st
from rows import row

from gateway.api.logs import InvalidParameter, pattern
from gateway.sessions.line_writer import ADVICE, LineWriter
from gateway.sessions.logs import LogStore

GROUP, STREAM = "/aws/lambda-microvms/app", "2026/11/25[1.0]microvm-1"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiRig]:
    one = ApiRig(tmp_path_factory.mktemp("logs"))
    for number in range(10):
        one.logs.append(ACCOUNT, GROUP, STREAM, [f"line {number} {'odd' if number % 2 else 'even'}"])
    one.logs.append(ACCOUNT, GROUP, "build/1.0/b", ["STEP 1", "ERROR: no"])
    one.logs.append(OTHER, "/theirs", "s", ["secret"])
    yield one
    one.close()


def messages(answer: dict[str, Any]) -> list[str]:
    return [event["message"] for event in answer["events"]]


@row("GetLogEvents", "newest first without `startFromHead`; tokens go forth and back, and stand still at the end", "D")
def test_get_log_events(api: ApiRig) -> None:
    client = api.client("logs")
    ask = {"logGroupName": GROUP, "logStreamName": STREAM, "limit": 4}
    last = client.get_log_events(**ask)
    assert messages(last) == [f"line {n} {'odd' if n % 2 else 'even'}" for n in (6, 7, 8, 9)]
    before = client.get_log_events(**ask, nextToken=last["nextBackwardToken"])
    assert [one.split()[1] for one in messages(before)] == ["2", "3", "4", "5"]
    head = client.get_log_events(**ask, startFromHead=True)
    assert [one.split()[1] for one in messages(head)] == ["0", "1", "2", "3"]
    following = client.get_log_events(**ask, nextToken=last["nextForwardToken"])
    assert following["events"] == [] and following["nextForwardToken"] == last["nextForwardToken"]
    api.logs.append(ACCOUNT, GROUP, STREAM, ["line 10 even"])
    assert messages(client.get_log_events(**ask, nextToken=last["nextForwardToken"])) == ["line 10 even"]


@row("FilterLogEvents", "across streams, by time, pattern and stream names; pages; every event has its own id", "D")
def test_filter_log_events(api: ApiRig) -> None:
    client = api.client("logs")
    pages = list(client.get_paginator("filter_log_events").paginate(logGroupName=GROUP, PaginationConfig={"PageSize": 3}))
    events = [event for page in pages for event in page["events"]]
    assert len({event["eventId"] for event in events}) == len(events) >= 12 and len(pages) >= 4
    assert messages(client.filter_log_events(logGroupName=GROUP, filterPattern="ERROR")) == ["ERROR: no"]
    assert all("odd" in one for one in messages(client.filter_log_events(logGroupName=GROUP, filterPattern="line -even")))
    assert messages(client.filter_log_events(logGroupName=GROUP, logStreamNames=["build/1.0/b"])) == ["STEP 1", "ERROR: no"]
    assert client.filter_log_events(logGroupName=GROUP, endTime=1)["events"] == []


@row("logs", "`/aws/lambda/microvms/<image>`, the announcement's name, finds the same streams", "ours")
def test_the_announced_name(api: ApiRig) -> None:
    client = api.client("logs")
    assert "STEP 1" in messages(client.filter_log_events(logGroupName="/aws/lambda/microvms/app"))
    assert client.describe_log_streams(logGroupName="/aws/lambda/microvms/app")["logStreams"]


@row("DescribeLogGroups", "the account's own, with sizes; DescribeLogStreams by name or by last event", "D")
def test_describe(api: ApiRig) -> None:
    client = api.client("logs")
    (group,) = client.describe_log_groups()["logGroups"]
    assert group["logGroupName"] == GROUP and group["storedBytes"] > 0 and group["arn"].endswith(f"log-group:{GROUP}:*")
    first = client.describe_log_streams(logGroupName=GROUP, limit=1)
    second = client.describe_log_streams(logGroupName=GROUP, limit=1, nextToken=first["nextToken"])
    assert [one["logStreams"][0]["logStreamName"] for one in (first, second)] == [STREAM, "build/1.0/b"]
    assert "nextToken" not in second
    named = client.describe_log_groups(logGroupIdentifiers=[group["arn"], "/none"])["logGroups"]
    assert [one["logGroupName"] for one in named] == [GROUP] and client.describe_log_groups(logGroupIdentifiers=["/none"])[
        "logGroups"
    ] == []
    newest = client.describe_log_streams(logGroupName=GROUP, orderBy="LastEventTime", descending=True)["logStreams"]
    assert len(newest) == 2 and newest[0]["lastEventTimestamp"] >= newest[1]["lastEventTimestamp"]


@row("logs", "what is not there: ResourceNotFoundException 400; another account's group is not there", "D")
def test_not_found(api: ApiRig) -> None:
    client = api.client("logs")
    for group in ("/none", "/theirs", "../../x"):
        with pytest.raises(client.exceptions.ResourceNotFoundException):
            client.filter_log_events(logGroupName=group)
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.get_log_events(logGroupName=GROUP, logStreamName="none")
    with pytest.raises(client.exceptions.InvalidParameterException):
        client.get_log_events(logGroupName=GROUP, logStreamName=STREAM, nextToken="x")
    with pytest.raises(ClientError) as error:
        client.put_log_events(logGroupName=GROUP, logStreamName=STREAM, logEvents=[])
    assert error.value.response["Error"]["Code"] == "UnknownOperationException"


@row("logs", "permission: logs:<Operation> on the group's ARN", "D")
def test_permission(api: ApiRig) -> None:
    arn = f"arn:aws:logs:us-east-1:{ACCOUNT}:log-group:{GROUP}:*"
    policy = {"Statement": [{"Effect": "Allow", "Action": "logs:FilterLogEvents", "Resource": arn}]}
    key = api.do(api.accounts.create_key(ACCOUNT, "reader", policy))
    client = api.client("logs", (key.id, key.secret))
    assert client.filter_log_events(logGroupName=GROUP)["events"]
    with pytest.raises(ClientError) as error:
        client.describe_log_groups()
    assert error.value.response["Error"]["Code"] == "AccessDeniedException"


@pytest.mark.parametrize(
    ("text", "message", "matches"),
    [
        ("", "anything", True),
        ("a b", "b and a", True),
        ("a b", "only a", False),
        ('"a b"', "x a b", True),
        ('"a b"', "b a", False),
        ("-a", "b", True),
        ("-a", "a", False),
        ("?a ?b", "has b", True),
        ("?a ?b", "c", False),
    ],
)
def test_patterns(text: str, message: str, matches: bool) -> None:
    assert pattern(text)(message) is matches


def test_other_patterns_are_refused() -> None:
    for text in ("{ $.level = 1 }", "[a, b]"):
        with pytest.raises(InvalidParameter):
            pattern(text)


@pytest.mark.parametrize(
    ("is_limited", "channel", "advised"),
    [(True, 2, 1), (False, 2, 0), (True, 0, 0)],  # 0: a RUN step's, which no capability of the microVM's helps
)
def test_what_an_application_may_not_do_is_explained_once(tmp_path: Path, is_limited: bool, channel: int, advised: int) -> None:
    store = LogStore(tmp_path)
    writer = LineWriter(store, "a", "g", "s", is_limited)
    for part in (b"mount: /mnt: Operation", b" not permitted\nmore\n", b"ip: RTNETLINK answers: Operation not permitted\n"):
        writer.feed(channel, part)
    texts = [event.m for event in store.read("a", "g", "s")[0]]
    assert texts.count(ADVICE) == advised and len(texts) == 3 + advised
    assert not advised or texts.index(ADVICE) == 2, "behind the lines that came together"


@given(st.binary(max_size=200), st.lists(st.integers(1, 20), max_size=20))
def test_any_cut_of_a_byte_stream_gives_the_same_lines(data: bytes, cuts: list[int]) -> None:
    class Kept(LogStore):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def append(self, account: str, group: str, stream: str, lines: list[str]) -> None:
            self.lines += lines

    whole, parts = Kept(), Kept()
    one, other = LineWriter(whole, "a", "g", "s"), LineWriter(parts, "a", "g", "s")
    one.feed(0, data)
    at = 0
    for cut in [*cuts, len(data)]:
        other.feed(0, data[at : at + cut])
        at += cut
    one.flush()
    other.flush()
    assert whole.lines == parts.lines


@row("logs", "streams silent for longer than `logs.retention_days` go; others, and groups, stay", "ours")
def test_retention(api: ApiRig) -> None:
    store = api.logs
    store.append(ACCOUNT, "/old", "gone", ["x"])
    store.append(ACCOUNT, "/old", "kept", ["x"])
    store.flush()
    path = store._path((ACCOUNT, "/old", "gone"), 0)
    os.utime(path, (time.time() - 90_000,) * 2)
    assert store.drop_old(86_400) == [(ACCOUNT, "/old", "gone")]
    assert store.streams(ACCOUNT, "/old") == ["kept"]
