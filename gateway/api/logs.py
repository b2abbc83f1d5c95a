"""CloudWatch Logs' read calls, served from the embedded log store (Logs_20140328, JSON 1.1)."""

from __future__ import annotations

from typing import Any

from gateway.sessions.logs import LogStore

from .errors import ApiError, Validation

TARGET_PREFIX = "Logs_20140328."


class _NotFound(ApiError):
    kind, status = "ResourceNotFoundException", 400


class Logs:
    def __init__(self, store: LogStore) -> None:
        self._store = store

    def _group(self, call: dict[str, Any]) -> str:
        group = str(call.get("logGroupName") or call.get("logGroupIdentifier") or "")
        if group not in self._store.groups():
            raise _NotFound("The specified log group does not exist.")
        return group

    async def describe_log_groups(self, call: dict[str, Any]) -> dict[str, Any]:
        prefix = str(call.get("logGroupNamePrefix") or "")
        return {"logGroups": [{"logGroupName": name} for name in self._store.groups() if name.startswith(prefix)]}

    async def describe_log_streams(self, call: dict[str, Any]) -> dict[str, Any]:
        prefix = str(call.get("logStreamNamePrefix") or "")
        names = self._store.streams(self._group(call))
        if call.get("descending"):
            names.reverse()
        return {"logStreams": [{"logStreamName": name} for name in names if name.startswith(prefix)]}

    async def get_log_events(self, call: dict[str, Any]) -> dict[str, Any]:
        """Forward tokens are positions in the stream, so that a follower asks for what is new only."""
        group, stream = self._group(call), str(call.get("logStreamName") or "")
        if stream not in self._store.streams(group):
            raise _NotFound("The specified log stream does not exist.")
        token = str(call.get("nextToken") or "f/0")
        if not token.startswith("f/") or not token[2:].isdigit():
            raise Validation("The specified nextToken is invalid.")
        events, after = self._store.read(group, stream, int(token[2:]), int(call.get("limit") or 10_000))
        first, last = int(call.get("startTime") or 0), int(call.get("endTime") or 1 << 62)
        return {
            "events": [{"timestamp": e.t, "message": e.m, "ingestionTime": e.t} for e in events if first <= e.t < last],
            "nextForwardToken": f"f/{after}",
            "nextBackwardToken": "b/0",
        }

    async def filter_log_events(self, call: dict[str, Any]) -> dict[str, Any]:
        group = self._group(call)
        wanted = call.get("logStreamNames")
        first, last = int(call.get("startTime") or 0), int(call.get("endTime") or 1 << 62)
        pattern, limit = str(call.get("filterPattern") or "").strip('"'), int(call.get("limit") or 10_000)
        found: list[dict[str, Any]] = []
        for stream in self._store.streams(group):
            if wanted is not None and stream not in wanted:
                continue
            if not stream.startswith(str(call.get("logStreamNamePrefix") or "")):
                continue
            events, _ = self._store.read(group, stream)
            found += [
                {"logStreamName": stream, "timestamp": e.t, "message": e.m, "ingestionTime": e.t, "eventId": f"{stream}/{at}"}
                for at, e in enumerate(events)
                if first <= e.t < last and pattern in e.m
            ]
        found.sort(key=lambda event: int(event["timestamp"]))
        return {"events": found[:limit], "searchedLogStreams": []}
