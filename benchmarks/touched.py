"""What of an image a launch touches, in pages: by a handler of its page faults (userfaultfd(2)), beside a mapping of its memory's file.

With the handler every page that is touched is the clone's own, whether it is written to or not; of the file's mapping a clone owns those
that it writes to, and the page cache has the others for all clones. What is not in the page cache is read from the disk with its
neighbours, by either.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import select
import socket
import struct
import threading
from pathlib import Path

from by_hand import ByHand
from report import figure, note

from vmm import syscalls
from vmm.driver import DEVICES
from vmm.firecracker import memory
from vmm.firecracker.jail import DISK, MEMORY
from vmm.syscalls import PAGE

_UFFDIO_COPY, _PAGEFAULT = 0xC028AA03, 0x12  # linux/userfaultfd.h
_MESSAGE = struct.Struct("<B7xQQ8x")  # of a fault: event, flags, address
_COPY = struct.Struct("<QQQQq")
_HUGE = 2 << 20
_ANSWER_SECONDS = 600.0


class Handler:
    """Answers a process's page faults from the image's file, and notes them."""

    def __init__(self, path: Path, image: Path) -> None:
        self.pages: set[int] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._file = image.open("rb")
        self._memory = mmap.mmap(self._file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        self._source = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._stops = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        data, ancillary, _, _ = client.recvmsg(65536, socket.CMSG_SPACE(4))
        descriptors = array.array("i", ancillary[0][2])
        regions = [(one["base_host_virt_addr"], one["size"], one["offset"]) for one in json.loads(data)]
        faults, poll = descriptors[0], select.poll()
        os.set_blocking(faults, False)
        poll.register(faults, select.POLLIN)
        while not self._stops.is_set():
            if not poll.poll(100):
                continue
            try:
                event, _, address = _MESSAGE.unpack(os.read(faults, _MESSAGE.size))
            except BlockingIOError:
                continue
            if event == _PAGEFAULT:
                self._answer(faults, address & ~(PAGE - 1), regions)
        os.close(faults)
        client.close()

    def _answer(self, faults: int, address: int, regions: list[tuple[int, int, int]]) -> None:
        for start, size, offset in regions:
            if start <= address < start + size:
                at = offset + address - start
                self.pages.add(at // PAGE)
                copy = bytearray(_COPY.pack(address, self._source + at, PAGE, 0, 0))
                with contextlib.suppress(FileExistsError):
                    fcntl.ioctl(faults, _UFFDIO_COPY, copy)

    def close(self) -> None:
        self._stops.set()
        self._thread.join()
        self._listener.close()


def data_pages(image: Path) -> set[int]:
    """Pages of the file that are no holes."""
    with image.open("rb") as file:
        return {page for start, end in syscalls.data_segments(file.fileno()) for page in range(start // PAGE, -(-end // PAGE))}


def cached_pages(image: Path) -> int:
    """Of the file, in the page cache (mincore(2))."""
    size = image.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    with image.open("rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    found = (ctypes.c_ubyte * (size // PAGE))()
    libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found)
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(one & 1 for one in found)


def forget(image: Path) -> None:
    """Has the page cache let go of a file."""
    with image.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def own_pages(pid: int, image: Path) -> int:
    """Of the mapping, those that are the process's own."""
    return sum(
        after - first
        for one in memory.regions(pid, image)
        for first, after in syscalls.private_pages(pid, one.address, one.address + one.pages * PAGE)
    )


async def touched(hand: ByHand, image: Path) -> None:
    """One launch of each kind to the first byte, woken; the file is not in the page cache before."""
    file = image / MEMORY
    data = data_pages(file)
    figure("image_pages", len(data), "pages")
    forget(file)
    note(f"{cached_pages(file)} pages of the image are cached before the launch")
    root, link = hand.root(file, image / DEVICES, image / DISK), await hand.network.take()
    handler = Handler(root / "faults.sock", file)
    one = hand.start(root, link)
    with await hand.socket_of(link) as ready:
        await asyncio.to_thread(one.connect)
        await asyncio.wait_for(asyncio.to_thread(one.load, "Uffd", "faults.sock"), _ANSWER_SECONDS)
        await asyncio.wait_for(asyncio.to_thread(one.wake), _ANSWER_SECONDS)
        await asyncio.wait_for(hand.first_byte(ready), _ANSWER_SECONDS)
    pages = set(handler.pages)
    figure("launch_touched_pages", len(pages), "pages", "image", len(data))
    figure("launch_touched_pages_of_data", len(pages & data), "pages", "image", len(data))
    figure("launch_touched_huge_pages", len({page * PAGE // _HUGE for page in pages}) * (_HUGE // PAGE), "pages", "image", len(data))
    figure("handler_own_pages", len(pages), "pages")
    figure("handler_cached_pages", cached_pages(file), "pages", "image", len(data))
    one.process.kill()
    handler.close()
    await hand.end(one, link)

    forget(file)
    root, link = hand.root(file, image / DEVICES, image / DISK), await hand.network.take()
    one = hand.start(root, link)
    with await hand.socket_of(link) as ready:
        await asyncio.to_thread(one.connect)
        await asyncio.to_thread(one.load)
        await asyncio.to_thread(one.wake)
        await hand.first_byte(ready)
    own = own_pages(one.process.pid, root / MEMORY)
    figure("mapping_own_pages", own, "pages", "handler", len(pages))
    figure("mapping_cached_pages", cached_pages(file), "pages", "image", len(data))
    await hand.end(one, link)
