"""Puts what a session has into a hypervisor that has not run, by a thread of ours inside it (qemu/mapper.c): a chain of diffs, mapped over
the guest's memory, and open files in the place of those that stood in for them. Before there is a session, memory of its own for what
its image has no data for.

Mapping costs by the number of runs, copying by their bytes. Where runs are too many, the longest are mapped and the rest are
copied: vm.max_map_count bounds a process's mappings, and each costs some 5 µs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from pathlib import Path

from . import diffs, syscalls
from .diffs import Manifest, Segment
from .errors import Damaged
from .memory import Mapping
from .syscalls import PAGE

_MAGIC = 0x70616D74
_MAP, _REPLACE = 1, 2
_MAPPED_MOST = 2000
_SECONDS = 20.0
_CHUNK = 4 << 20


class Mapper:
    """The socket to the thread inside; used before the guest runs, from one thread at a time. What is asked for is under way at once;
    whether it was done, `finish` says."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(_SECONDS)
        self._socket = sock
        self._asked = 0

    def map(self, file: int, ranges: list[tuple[int, int, int]]) -> None:
        """`ranges`: (address in the hypervisor, bytes, offset in the file); of /dev/zero, memory that is the hypervisor's own.
        Raises OSError."""
        self._ask(_MAP, [file], b"".join(struct.pack("<3Q", *one) for one in ranges), len(ranges))

    def replace_fd(self, file: int, replaced: int) -> None:
        """`file` from now on wherever the hypervisor has the file `replaced` open. Raises OSError."""
        self._ask(_REPLACE, [file, replaced])

    def finish(self) -> None:
        """Waits for all that was asked for. Raises OSError for the first that failed."""
        wanted, self._asked, answers = 4 * self._asked, 0, b""
        while len(answers) < wanted:
            got = self._socket.recv(wanted - len(answers))
            if not got:
                raise OSError(errno.EPIPE, "the hypervisor's mapper is gone")
            answers += got
        for (failure,) in struct.iter_unpack("<i", answers):
            if failure:
                raise OSError(failure, f"inside the hypervisor: {os.strerror(failure)}")

    def _ask(self, what: int, files: list[int], body: bytes = b"", count: int = 0) -> None:
        socket.send_fds(self._socket, [struct.pack("<3I", _MAGIC, what, count)], files)
        self._socket.sendall(body)
        self._asked += 1

    def close(self) -> None:
        self._socket.close()


def clear(mapping: Mapping, mapper: Mapper, holes: list[tuple[int, int]]) -> None:
    """Maps nobody's memory where the image's has holes: what a clone writes there is its own alone (vmm/sparse.py). Raises OSError."""
    with open("/dev/zero", "rb", buffering=0) as zeros:
        mapper.map(zeros.fileno(), [(mapping.start + start, end - start, 0) for start, end in holes])
    mapper.finish()


def load(mapping: Mapping, mapper: Mapper, snapshot: Path, manifest: Manifest) -> None:
    """Raises Damaged for files that do not fit, Missing, Unavailable, OSError."""
    segments = diffs.shown(snapshot, manifest.chain)
    if segments and segments[-1].after * PAGE > mapping.end - mapping.start:
        raise Damaged(f"{snapshot} has pages beyond the guest's memory")
    mapped = segments
    if len(segments) > _MAPPED_MOST:
        mapped = sorted(sorted(segments, key=lambda one: one.first - one.after)[:_MAPPED_MOST])
    copied = sorted(set(segments) - set(mapped)) if mapped is not segments else []
    for number in manifest.chain:
        with diffs.open_pages(snapshot, number) as file:
            size = os.fstat(file.fileno()).st_size
            if any((one.at + one.after - one.first) * PAGE > size for one in segments if one.diff == number):
                raise Damaged(f"{file.name} is shorter than its runs")
            ranges = [
                (mapping.start + one.first * PAGE, (one.after - one.first) * PAGE, one.at * PAGE) for one in mapped if one.diff == number
            ]
            if ranges:
                mapper.map(file.fileno(), ranges)
            _copy(mapping, file.fileno(), [one for one in copied if one.diff == number])
    mapper.finish()


def _copy(mapping: Mapping, file: int, segments: list[Segment]) -> None:
    for one in segments:
        done, length = 0, (one.after - one.first) * PAGE
        while done < length:
            data = os.pread(file, min(length - done, _CHUNK), one.at * PAGE + done)
            if not data:
                raise Damaged("a diff is shorter than its runs")
            buffer = ctypes.create_string_buffer(data, len(data))
            syscalls.write_memory(mapping.pid, ctypes.addressof(buffer), [(mapping.start + one.first * PAGE + done, len(data))])
            done += len(data)
