"""Waiting for descriptors without a thread that would stand for as long as they do."""

from __future__ import annotations

import asyncio


async def readable(descriptor: int) -> None:
    """Returns when there is something to read, or an end."""
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


async def writable(descriptor: int) -> None:
    """Returns when a pipe takes PIPE_BUF bytes at once (pipe(7)), or its reader has gone."""
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_writer(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(descriptor)
