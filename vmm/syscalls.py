"""System calls that Python 3.11 does not wrap: namespaces, mounts, pidfds, pagemap scans."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import re
import signal
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
MS_BIND = 4096
MS_PRIVATE = 1 << 18
MS_REC = 16384
MNT_DETACH = 2
_SYS_PIDFD_GETFD = 438
_SYS_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x02, 0x04, 0x08
_OPEN_HOW = struct.Struct("3Q")  # flags, mode, resolve
_PR_SET_CHILD_SUBREAPER = 36
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def setns(descriptor: int, kind: int) -> None:
    """Moves the calling thread into a namespace (setns(2))."""
    _check(_libc.setns(descriptor, kind), "setns")


def unshare(flags: int) -> None:
    """Gives the calling thread namespaces of its own (unshare(2))."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if part is None else part.encode() for part in (source, target, kind, data)]
    _check(_libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def umount(target: str) -> None:
    _check(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def mount_points() -> list[str]:
    """Returns mount points in the order in which they were mounted (proc_pid_mountinfo(5))."""
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    return [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in text.splitlines()]


def sync_file_system(path: Path) -> None:
    """Returns when all that was written to the file system of `path` is on the disk (syncfs(2))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _check(_libc.syncfs(descriptor), f"sync {path}")
    finally:
        os.close(descriptor)


def pidfd_getfd(pid: int, number: int) -> int:
    """Returns a duplicate of descriptor `number` of process `pid` (pidfd_getfd(2))."""
    pidfd = os.pidfd_open(pid)
    try:
        return _check(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0), "pidfd_getfd")
    finally:
        os.close(pidfd)


def open_beneath(directory: int, name: str, flags: int) -> int:
    """Opens what a name means below a directory, and nothing beyond it or through a link (openat2(2)). Raises OSError: ELOOP at a link,
    EXDEV where it would lead out."""
    how = _OPEN_HOW.pack(flags, 0, _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH)
    return _check(_libc.syscall(_SYS_OPENAT2, directory, os.fsencode(name), how, ctypes.c_size_t(len(how))), f"open {name}")


def exchange(one: Path, other: Path) -> None:
    """Has each take the other's place, at one instant (renameat2(2), RENAME_EXCHANGE)."""
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
    _check(_libc.renameat2(*arguments), f"exchange {one} and {other}")


def become_subreaper() -> None:
    """Orphans below this process are given to it, so that they can be waited for (prctl(2))."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def ended_children() -> set[int]:
    """Returns ids of children of this process that have ended and are still to be waited for (proc(5), /proc/PID/task/TID/children)."""
    ended = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            ended |= {int(pid) for pid in (task / "children").read_bytes().split() if start_time(int(pid)) is None}
    return ended


def signal_process(pid: int, started: int, number: int) -> bool:
    """Sends a signal to the process that began at `started` (start_time), and to no other that has its number by now: False then.
    Raises OSError."""
    pidfd = os.pidfd_open(pid)
    try:
        if start_time(pid) != started:
            return False
        signal.pidfd_send_signal(pidfd, number)
        return True
    finally:
        os.close(pidfd)


def start_time(pid: int) -> int | None:
    """Returns the process's start in clock ticks since boot: with the pid, it names one process for ever. None if gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


# ---- pages that a process has changed in private mappings of files and of nothing (PAGEMAP_SCAN, Linux 6.7) ----

_PAGEMAP_SCAN = 0xC0606610
_PAGE_IS_FILE, _PAGE_IS_PRESENT, _PAGE_IS_SWAPPED, _PAGE_IS_ZERO = 4, 8, 16, 32
_OTHERS = _PAGE_IS_FILE | _PAGE_IS_ZERO
_REGIONS = 1 << 14
PAGE = 4096


class _ScanArgument(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages"),
            *("category_inverted", "category_mask", "category_anyof_mask", "return_mask"),
        )
    )


def private_pages(pid: int, start: int, end: int) -> list[tuple[int, int]]:
    """Runs (first page, page after the last) of [start, end) that are the process's own: no file's, and not the kernel's page of
    zeros, which is mapped where memory of nobody's was read before it was written.

    Source: Documentation/admin-guide/mm/pagemap.rst. `walk_end` may be stale when the walk is complete (6.18), so fewer
    regions than fit mean the end. Kernels without PAGEMAP_SCAN are read through pagemap.
    """
    descriptor = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        vector = (ctypes.c_uint64 * (3 * _REGIONS))()
        runs: list[tuple[int, int]] = []
        current = start
        while current < end:
            argument = _ScanArgument(
                96, 0, current, end, 0, ctypes.addressof(vector), _REGIONS, 0,
                _OTHERS, _OTHERS, _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED, _OTHERS,
            )  # fmt: skip
            count = _libc.ioctl(descriptor, ctypes.c_ulong(_PAGEMAP_SCAN), ctypes.byref(argument))
            if count < 0:
                return _private_pages_by_pagemap(descriptor, start, end)
            for i in range(0, 3 * count, 3):
                first, last = (vector[i] - start) // PAGE, (vector[i + 1] - start) // PAGE
                if runs and runs[-1][1] == first:
                    runs[-1] = (runs[-1][0], last)
                else:
                    runs.append((first, last))
            if count < _REGIONS:
                break
            current = max(argument.walk_end, vector[3 * count - 2])
        return runs
    finally:
        os.close(descriptor)


_FRAME = 1 << 63 | (1 << 55) - 1  # of an entry: whether the page is present, and the number of its frame


def _page_of_zeros() -> int:
    """Returns how pagemap says that a page is the kernel's page of zeros."""
    with mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page, open("/proc/self/pagemap", "rb", buffering=0) as own:
        at = ctypes.c_char.from_buffer(page)
        try:
            assert page[0] == 0  # read, and so mapped
            return int.from_bytes(os.pread(own.fileno(), 8, ctypes.addressof(at) // PAGE * 8), "little") & _FRAME
        finally:
            del at


def _private_pages_by_pagemap(descriptor: int, start: int, end: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    zeros = _page_of_zeros()
    page, chunk = 0, 1 << 16
    total = (end - start) // PAGE
    while page < total:
        data = os.pread(descriptor, min(chunk, total - page) * 8, (start // PAGE + page) * 8)
        for (entry,) in struct.iter_unpack("<Q", data):
            if entry >> 62 and not entry >> 61 & 1 and entry & _FRAME != zeros:
                if runs and runs[-1][1] == page:
                    runs[-1] = (runs[-1][0], page + 1)
                else:
                    runs.append((page, page + 1))
            page += 1
    return runs


class _IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


_libc.process_vm_writev.restype = ctypes.c_ssize_t
_IOV_MAX = 1024


def write_memory(pid: int, source: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Copies bytes that lie one after another at address `source` of this process to (address, length) ranges of another."""
    for first in range(0, len(ranges), _IOV_MAX):
        part = ranges[first : first + _IOV_MAX]
        total = sum(length for _, length in part)
        remote = (_IoVec * len(part))(*(_IoVec(at, length) for at, length in part))
        local = (_IoVec * 1)(_IoVec(source, total))
        done = _check(
            _libc.process_vm_writev(pid, local, ctypes.c_ulong(1), remote, ctypes.c_ulong(len(part)), ctypes.c_ulong(0)),
            "process_vm_writev",
        )
        if done != total:
            raise OSError(f"process_vm_writev: {done} of {total} bytes")
        source += total


TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


def open_tap(name: str) -> int:
    """Opens a tap of the calling thread's network namespace: the persistent one that has this name, or a new one, which goes with the
    last descriptor of it. Raises OSError."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


# ---- sparse files ----

_COPY_CHUNK = 4 << 20


def data_segments(descriptor: int) -> Iterator[tuple[int, int]]:
    """Returns the parts of a sparse file that hold data: (start, end) in bytes."""
    end = 0
    while True:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def copy_range(source: int, start: int, target: int, at: int, length: int) -> None:
    """Copies bytes from one file into another, inside the kernel (sendfile(2)). Raises OSError; EOFError for a source too short."""
    os.lseek(target, at, os.SEEK_SET)
    end = start + length
    while start < end:
        moved = os.sendfile(target, source, start, min(end - start, _COPY_CHUNK))
        if not moved:
            raise EOFError(f"{end - start} bytes are missing")
        start += moved


def waited_seconds(pid: int) -> float:
    """Returns how long the process's threads could have run and waited for a processor (Documentation/scheduler/sched-stats.rst); 0 where
    the kernel does not say."""
    total = 0
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError, IndexError, ValueError), open(f"/proc/{pid}/task/{thread}/schedstat", "rb") as file:
                total += int(file.read().split()[1])
    except OSError:
        pass
    return total / 1e9


def read_bytes(pid: int) -> int:
    """Returns what the process has had read from disks (proc_pid_io(5)); 0 where the kernel does not say."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/io", "rb") as file:
        for line in file:
            if line.startswith(b"read_bytes:"):
                return int(line.split()[1])
    return 0
