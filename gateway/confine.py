"""What a process of ours gives up by itself before it reads what a stranger has sent: files by Landlock, system calls by a filter.

It keeps its user, and what that user may do elsewhere is what somebody who takes it over would be after: the store, the keys, the sockets
of the service's other processes. Landlock (landlock(7)) says which names can be opened, the filter (seccomp(2)) that nothing is connected
to, signalled, traced or started.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Collection, Iterable
from pathlib import Path

LANDLOCK, FILTER = "landlock", "filter"  # the layers
_libc = ctypes.CDLL(None, use_errno=True)
_SYS_CREATE_RULESET, _SYS_ADD_RULE, _SYS_RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION, _RULE_PATH_BENEATH = 1, 1
_RULESET, _PATH_BENEATH = struct.Struct("3Q"), struct.Struct("=Qi")
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 4, 22, 38, 2
# <linux/landlock.h>: what each of its versions can refuse. Reading is execution (of shared objects, by mmap), files and lists of names.
_FS_BY_VERSION = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
# Writing, removing, cutting short, and making directories and plain files: no links, which others would follow.
_WRITES = 1 << 1 | _READ_FILE | _READ_DIR | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 14
_FILE_ONLY = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # of these, those that a rule about a file may have
_NET, _NET_VERSION = 0b11, 4  # bind and connect TCP
_SCOPE, _SCOPE_VERSION = 0b11, 6  # abstract sockets, and signals, of processes outside
# <linux/filter.h>, <linux/seccomp.h>, <linux/audit.h>
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4  # in struct seccomp_data
_X32 = 0x40000000  # the other way to call an x86-64 kernel
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# By name, so that a reader sees what is refused; numbers of x86-64 and of arm64 (their unistd.h).
REFUSED = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "accept": (43, 202), "accept4": (288, 242),
    "sendto": (44, 206), "sendmsg": (46, 211), "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "bpf": (321, 280), "userfaultfd": (323, 282), "perf_event_open": (298, 241), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "mount": (165, 40), "umount2": (166, 39), "unshare": (272, 97), "setns": (308, 268),
    "open_by_handle_at": (304, 265), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "mount_setattr": (442, 442), "prlimit64": (302, 261), "process_madvise": (440, 440), "kcmp": (312, 272), "shmget": (29, 194),
    "shmat": (30, 196), "msgget": (68, 186), "mq_open": (240, 180),
}  # fmt: skip


def confine(reads: Iterable[Path], writes: Iterable[Path], needs: Collection[str] = ()) -> list[str]:
    """Keeps of the file system what is below `reads`, to be read, and plain files below `writes`; then of the system calls those that work
    on it, and of those that are refused the ones that it `needs`. Returns the layers that stand: a kernel may have one of them, or none.
    There is no way back. Raises OSError for a layer that is there and does not take what it is given."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
    return [*_by_landlock(reads, writes), *_by_filter(needs)]


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _by_landlock(reads: Iterable[Path], writes: Iterable[Path]) -> list[str]:
    version = _libc.syscall(_SYS_CREATE_RULESET, None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION)
    if version < 0:
        if ctypes.get_errno() in (errno.ENOSYS, errno.EOPNOTSUPP):
            return []
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    everything = sum(rights for since, rights in _FS_BY_VERSION.items() if since <= version)
    attributes = _RULESET.pack(everything, _NET if version >= _NET_VERSION else 0, _SCOPE if version >= _SCOPE_VERSION else 0)
    size = 8 * (1 + (version >= _NET_VERSION) + (version >= _SCOPE_VERSION))
    rules = _check(_libc.syscall(_SYS_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0), "landlock_create_ruleset")
    try:
        for path in reads:
            _allow(rules, path, _EXECUTE | _READ_FILE | _READ_DIR)
        for path in writes:
            _allow(rules, path, everything & _WRITES)
        _check(_libc.syscall(_SYS_RESTRICT_SELF, rules, 0), "landlock_restrict_self")
    finally:
        os.close(rules)
    return [LANDLOCK]


def _allow(rules: int, path: Path, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        beneath = _PATH_BENEATH.pack(rights if path.is_dir() else rights & _FILE_ONLY, place)
        _check(_libc.syscall(_SYS_ADD_RULE, rules, _RULE_PATH_BENEATH, beneath, 0), f"landlock_add_rule {path}")
    finally:
        os.close(place)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def program(machine: str, needs: Collection[str] = ()) -> bytes:
    """Returns the filter, in BPF: calls that are refused fail with EPERM, and whoever calls in another way than the machine's ends."""
    column = list(_MACHINES).index(machine)
    numbers = sorted(number for name, pair in REFUSED.items() if name not in needs and (number := pair[column]) is not None)

    def step(operation: int, yes: int, no: int, value: int) -> bytes:
        return struct.pack("HBBI", operation, yes, no, value)

    code = [
        step(_LOAD, 0, 0, _ARCHITECTURE_AT), step(_EQUAL, 1, 0, _MACHINES[machine]), step(_RETURN, 0, 0, _KILL),
        step(_LOAD, 0, 0, _NUMBER_AT), step(_AT_LEAST, 0, 1, _X32), step(_RETURN, 0, 0, _KILL),
    ]  # fmt: skip
    left = len(numbers)
    for at, number in enumerate(numbers):
        code.append(step(_EQUAL, left - at, 0, number))  # over the others, and over `allow`
    return b"".join([*code, step(_RETURN, 0, 0, _ALLOW), step(_RETURN, 0, 0, _ERRNO | errno.EPERM)])


def _by_filter(needs: Collection[str]) -> list[str]:
    machine = platform.machine()
    if machine not in _MACHINES:
        return []
    code = program(machine, needs)
    loaded = _Program(len(code) // 8, code)
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(loaded), 0, 0) < 0:
        if ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL):  # a kernel without
            return []
        raise OSError(ctypes.get_errno(), "seccomp")
    return [FILTER]
