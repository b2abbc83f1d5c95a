"""`python -m vmm`: the vmm daemon."""

from __future__ import annotations

from gateway import process
from gateway.config import Settings

from .daemon import serve


async def main(settings: Settings) -> None:
    await serve(settings, process.ready)


process.run("vmm", main)
