"""A daemon that starts takes hypervisors over: those that hang cost it one bounded time, together."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

from vmm.daemon import adopt_all


class Driver:
    """Some of its processes hang, and one cannot be read."""

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds

    def records(self) -> list[Any]:
        return [SimpleNamespace(vm=f"{number}-{kind}", session="s", kind=kind) for number, kind in enumerate(self.kinds)]

    async def adopt(self, record: Any) -> Any:
        if record.kind == "hangs":
            await asyncio.Event().wait()
        if record.kind == "fails":
            raise TimeoutError("it does not end")
        return None if record.kind == "gone" else record


async def test_hypervisors_that_hang_fail_no_start() -> None:
    """One after the other, three of them took longer than the supervisor waits for vmm, and the whole service did not start."""
    driver = Driver("well", *["hangs"] * 20, "fails", "gone", "well")
    began = time.monotonic()
    adopted = await adopt_all(driver, 0.2)  # type: ignore[arg-type]
    assert [record.vm for record, machine in adopted if machine is not None] == ["0-well", "23-well"]
    assert time.monotonic() - began < 2
