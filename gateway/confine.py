"""What a process of ours gives up by itself before it reads what a stranger has sent: files by Landlock, system calls by a filter.

It keeps its user, and what that user may do elsewhere is what somebody who takes it over would be after: the store, the keys, the sockets
of the service's other processes. Landlock (landlock(7)) says which names can be opened, the filter (seccomp(2)) that nothing is connected
to, signalled, traced or started. `confine` is the unpacker's; what the service's own processes keep is in gateway/own_walls.py.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

LANDLOCK, FILTER = "landlock", "filter"  # the layers
_libc = ctypes.CDLL(None, use_errno=True)
_SYS_CREATE_RULESET, _SYS_ADD_RULE, _SYS_RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION, _RULE_PATH_BENEATH = 1, 1
_RULESET, _PATH_BENEATH = struct.Struct("3Q"), struct.Struct("=Qi")
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_SYS_SECCOMP, _SECCOMP_SET_MODE_FILTER, _SPEC_ALLOW = {"x86_64": 317, "aarch64": 277}, 1, 4
# <linux/landlock.h>: what each of its versions can refuse. Reading is execution (of shared objects, by mmap), files and lists of names.
_FS_BY_VERSION = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
# Writing, removing, cutting short, and making directories and plain files: no links, which others would follow.
_WRITES = 1 << 1 | _READ_FILE | _READ_DIR | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 14
_FILE_ONLY = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # of these, those that a rule about a file may have
_NET, _NET_VERSION = 0b11, 4  # bind and connect TCP
_SCOPE, _SCOPE_VERSION = 0b11, 6  # abstract sockets, and signals, of processes outside
# <linux/filter.h>, <linux/seccomp.h>, <linux/audit.h>
_LOAD, _EQUAL, _AT_LEAST, _ANY, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
# In struct seccomp_data; of arguments their lower halves.
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT, _SECOND_ARGUMENT_AT = 0, 4, 16, 24
_CLONE_THREAD, _CLONE_NEW = 0x00010000, 0x7E020000  # <linux/sched.h>; all kinds of namespaces
_X32 = 0x40000000  # the other way to call an x86-64 kernel
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
Numbers = tuple[int | None, int | None]
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


# Of what nobody here has any use for, vmm, which is root, neither.
MACHINE = {
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "quotactl": (179, 60), "lookup_dcookie": (212, 18), "uselib": (134, None), "vhangup": (153, 58),
}  # fmt: skip
# What reaches into other processes, or into much of the kernel for little.
_REACHING = (
    "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "process_madvise", "kcmp", "bpf", "userfaultfd", "perf_event_open",
    "io_uring_setup", "io_uring_enter", "add_key", "request_key", "keyctl", "mount", "umount2", "open_tree", "move_mount", "fsopen",
    "mount_setattr", "unshare", "setns", "open_by_handle_at", "shmget", "shmat", "msgget", "mq_open",
)  # fmt: skip
OTHERS = {
    **{name: REFUSED[name] for name in _REACHING},
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "pivot_root": (155, 41), "chroot": (161, 51),
    "mknod": (133, None), "mknodat": (259, 33), "name_to_handle_at": (303, 264), "personality": (135, 92), "syslog": (103, 116),
    "semget": (64, 190), "memfd_secret": (447, 447), "io_uring_register": (427, 427),
}  # fmt: skip
STARTS = {name: REFUSED[name] for name in ("execve", "execveat", "fork", "vfork")}
# Of who starts nobody: other ways to signal others of its user, and to slow them down.
_DISTURBING = {
    **{name: REFUSED[name] for name in ("tkill", "rt_sigqueueinfo", "pidfd_open", "pidfd_send_signal")},
    "rt_tgsigqueueinfo": (297, 240), "setpriority": (141, 140), "ioprio_set": (251, 30),
}  # fmt: skip
# Of which it may be the object itself, by its number or by 0.
_OF_ITSELF = {
    **{name: REFUSED[name] for name in ("kill", "tgkill", "prlimit64")}, "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
}  # fmt: skip
# Whom a descriptor's signals go to, and which (fcntl(2), F_SETOWN, F_SETSIG, F_SETOWN_EX; <asm-generic/sockios.h>, FIOSETOWN, SIOCSPGRP).
_OWNED = {"fcntl": (8, 10, 15), "ioctl": (0x8901, 0x8902)}
_CALLS = {
    **{name: REFUSED[name] for name in ("clone", "clone3", "socket")}, "fcntl": (72, 25), "ioctl": (16, 29), **_OF_ITSELF,
}  # fmt: skip
# The calls of an event loop, first in the filter: kernels before 5.11 walk it at each call.
_HOT = {
    "read": (0, 63), "write": (1, 64), "recvfrom": (45, 207), "sendto": (44, 206), "recvmsg": (47, 212), "sendmsg": (46, 211),
    "writev": (20, 66), "epoll_wait": (232, None), "epoll_pwait": (281, 22), "epoll_ctl": (233, 21), "futex": (202, 98),
}  # fmt: skip


def confine(reads: Iterable[Path], writes: Iterable[Path], needs: Collection[str] = ()) -> list[str]:
    """Keeps of the file system what is below `reads`, to be read, and plain files below `writes`; then of the system calls those that work
    on it, and of those that are refused the ones that it `needs`. Returns the layers that stand: a kernel may have one of them, or none.
    There is no way back. Raises OSError for a layer that is there and does not take what it is given."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
    return [*_by_landlock(reads, writes), *_by_filter(needs)]


def confine_service(
    reads: Iterable[Path], writes: Iterable[Path], refused: Mapping[str, Numbers], families: Iterable[int] | None, starts: bool
) -> list[str]:  # fmt: skip
    """Of a process that serves: of the file system what is below `reads`, to be read, and below `writes`, to be changed (all of it where
    there are no `reads`); of the system calls those that are not `refused`; new sockets of `families` (None: of all); other processes to be
    started and signalled only where `starts`. For the calling thread, and those that it starts. Returns the layers that stand. Raises
    OSError."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
    reads = list(reads)
    if reads:
        _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    layers = _by_landlock(reads, writes, True) if reads else []
    machine = platform.machine()
    if machine not in _MACHINES:
        return layers
    return [*layers, *_load_filter(service_program(machine, refused, families, starts, os.getpid()))]


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def landlock_version() -> int:
    """Returns the kernel's; 0 where it has none, or where that is turned off. Raises OSError."""
    version = int(_libc.syscall(_SYS_CREATE_RULESET, None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION))
    if version < 0 and ctypes.get_errno() not in (errno.ENOSYS, errno.EOPNOTSUPP):
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    return max(version, 0)


def _by_landlock(reads: Iterable[Path], writes: Iterable[Path], serves: bool = False) -> list[str]:
    """`serves`: it goes on speaking TCP, and what it may write below is its own to arrange."""
    if not (version := landlock_version()):
        return []
    everything = sum(rights for since, rights in _FS_BY_VERSION.items() if since <= version)
    attributes = _RULESET.pack(
        everything, _NET if version >= _NET_VERSION and not serves else 0, _SCOPE if version >= _SCOPE_VERSION else 0
    )
    size = 8 * (1 + (version >= _NET_VERSION) + (version >= _SCOPE_VERSION))
    rules = _check(_libc.syscall(_SYS_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0), "landlock_create_ruleset")
    try:
        for path in reads:
            _allow(rules, path, _EXECUTE | _READ_FILE | _READ_DIR)
        for path in writes:
            _allow(rules, path, everything & ~_EXECUTE if serves else everything & _WRITES)
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
    except OSError as error:
        if error.errno != errno.EBADFD:  # a pipe or a socket, as /dev/stdout may be: Landlock governs none
            raise
    finally:
        os.close(place)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _step(operation: int, yes: int, no: int, value: int) -> bytes:
    return struct.pack("HBBI", operation, yes, no, value)


def _beginning(machine: str) -> list[bytes]:
    """Of a filter: who calls in another way than the machine's ends; then the call's number is there to be compared."""
    return [
        _step(_LOAD, 0, 0, _ARCHITECTURE_AT), _step(_EQUAL, 1, 0, _MACHINES[machine]), _step(_RETURN, 0, 0, _KILL),
        _step(_LOAD, 0, 0, _NUMBER_AT), _step(_AT_LEAST, 0, 1, _X32), _step(_RETURN, 0, 0, _KILL),
    ]  # fmt: skip


def program(machine: str, needs: Collection[str] = ()) -> bytes:
    """Returns the filter, in BPF: calls that are refused fail with EPERM, and whoever calls in another way than the machine's ends."""
    column = list(_MACHINES).index(machine)
    numbers = sorted(number for name, pair in REFUSED.items() if name not in needs and (number := pair[column]) is not None)

    code = _beginning(machine)
    left = len(numbers)
    for at, number in enumerate(numbers):
        code.append(_step(_EQUAL, left - at, 0, number))  # over the others, and over `allow`
    return b"".join([*code, _step(_RETURN, 0, 0, _ALLOW), _step(_RETURN, 0, 0, _ERRNO | errno.EPERM)])


def service_program(machine: str, refused: Mapping[str, Numbers], families: Iterable[int] | None, starts: bool, pid: int) -> bytes:
    """Returns the filter of a process that serves, whose number is `pid`."""
    column = list(_MACHINES).index(machine)

    def only(name: str, *tests: bytes) -> list[bytes]:
        """Of one call: what its first argument must be like, for all but the last test; else it is refused."""
        number = _CALLS[name][column]
        return [] if number is None else [_step(_EQUAL, 0, 1 + len(tests), number), _step(_LOAD, 0, 0, _FIRST_ARGUMENT_AT), *tests]

    allow, refuse = _step(_RETURN, 0, 0, _ALLOW), _step(_RETURN, 0, 0, _ERRNO | errno.EPERM)
    code = _beginning(machine)
    for outcome, calls in ((allow, _HOT), (refuse, refused)):
        for pair in calls.values():
            if (number := pair[column]) is not None:
                code += [_step(_EQUAL, 0, 1, number), outcome]
    if families is not None:
        code += only("socket", *(part for family in families for part in (_step(_EQUAL, 0, 1, family), allow)), refuse)
    if not starts:
        code += [_step(_EQUAL, 0, 1, _CALLS["clone3"][column] or 0), _step(_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
        code += only("clone", _step(_ANY, 2, 0, _CLONE_NEW), _step(_ANY, 0, 1, _CLONE_THREAD), allow, refuse)
        for pair in _DISTURBING.values():
            code += [_step(_EQUAL, 0, 1, pair[column] or 0), refuse]
        for name in _OF_ITSELF:  # 0 is the own group for kill(2), in which others may be
            itself = [_step(_EQUAL, 0, 1, 0), allow] if name not in ("kill", "tgkill") else []
            code += only(name, *itself, _step(_EQUAL, 0, 1, pid), allow, refuse)
        for name, words in _OWNED.items():
            tests = [part for word in words for part in (_step(_EQUAL, 0, 1, word), refuse)]
            code += [_step(_EQUAL, 0, 2 + len(tests), _CALLS[name][column] or 0), _step(_LOAD, 0, 0, _SECOND_ARGUMENT_AT), *tests, allow]
    return b"".join([*code, allow])


def _by_filter(needs: Collection[str]) -> list[str]:
    machine = platform.machine()
    return _load_filter(program(machine, needs)) if machine in _MACHINES else []


def _load_filter(code: bytes) -> list[str]:
    """Without the slower memory accesses that kernels before 5.16 have behind a filter: it keeps a process from the kernel, and not parts
    of that process from each other (seccomp(2), SECCOMP_FILTER_FLAG_SPEC_ALLOW)."""
    loaded = _Program(len(code) // 8, code)
    if _libc.syscall(_SYS_SECCOMP[platform.machine()], _SECCOMP_SET_MODE_FILTER, _SPEC_ALLOW, ctypes.byref(loaded)) < 0:
        if ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL):  # a kernel without
            return []
        raise OSError(ctypes.get_errno(), "seccomp")
    return [FILTER]
