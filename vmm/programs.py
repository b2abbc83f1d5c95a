"""Programs that do one thing and end, run beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

_QUOTED_CHARACTERS = 300


async def run(what: str, *command: str, seconds: float, **named: Any) -> None:
    """Waits for the program's end; it is killed at the deadline, and where its caller is cancelled. Raises OSError, which begins with
    `what` and has the end of its standard error."""
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, **named)
    try:
        async with asyncio.timeout(seconds):
            _, errors = await process.communicate()
    except TimeoutError as error:
        raise TimeoutError(f"{what}: not done in {seconds:g} s") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    if process.returncode:
        raise OSError(f"{what}: {errors.decode(errors='replace').strip()[-_QUOTED_CHARACTERS:]}")
