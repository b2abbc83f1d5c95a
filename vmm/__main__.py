"""`python -m vmm`: the vmm daemon."""

from __future__ import annotations

import sys

from gateway import process
from gateway.config import Settings

from .errors import VmmError
from .serving import serve


async def main(settings: Settings) -> None:
    try:
        await serve(settings, process.ready)
    except VmmError as error:  # what the settings want, this host cannot do
        sys.exit(f"torpor: vmm: {error}")


process.run("vmm", main)
