"""The system calls that a hypervisor may make: a list of what is allowed, below QEMU's own, which is one of what is denied.

It was made from what QEMU 7.2 did in tests/vm/test_drivers.py, from its first line to its end, by strace(1): 43 calls. Every other of the
same kinds stands beside them that its or glibc's next version may choose instead: a call that is missing would end somebody's microVM.
What is in no list ends the process. Some calls are answered as by a kernel that has them not: QEMU or glibc tries them, and goes on
without.
"""

from __future__ import annotations

from collections.abc import Iterable

ALLOWED = {
    "the guest's work, most calls first": ("ppoll ioctl read write futex readv writev recvmsg sendmsg"),
    "files that it was given, and what its root holds": (
        "pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek fsync fdatasync fallocate ftruncate sync_file_range fadvise64 "
        "copy_file_range flock fcntl dup dup2 dup3 close close_range open openat access faccessat faccessat2 stat lstat fstat "
        "newfstatat statx statfs fstatfs readlink readlinkat getdents64 getcwd umask unlink unlinkat memfd_create"
    ),
    "sockets that it was given": (
        "accept accept4 listen shutdown recvfrom sendto recvmmsg sendmmsg getsockname getpeername getsockopt setsockopt"
    ),
    "waiting": (
        "poll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2 pipe "
        "pipe2 signalfd signalfd4 timerfd_create timerfd_settime timerfd_gettime"
    ),
    "memory": ("mmap munmap mprotect mremap madvise msync mincore mlock mlock2 munlock mlockall munlockall brk membarrier"),
    "time": (
        "clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time timer_create timer_settime timer_gettime "
        "timer_getoverrun timer_delete getitimer setitimer alarm times getrusage"
    ),
    "threads, signals and itself": (
        "futex_waitv sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max "
        "sched_get_priority_min gettid getpid getppid getpgrp getuid geteuid getgid getegid getresuid getresgid getgroups "
        "getcpu getpgid getsid sched_getattr set_robust_list get_robust_list set_tid_address rseq arch_prctl rt_sigaction "
        "rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack restart_syscall pause tgkill tkill "
        "kill wait4 waitid prctl seccomp prlimit64 getrlimit uname sysinfo getrandom exit exit_group"
    ),
}
# As by a kernel without (ENOSYS): io_uring, of which QEMU makes three rings in each process and fills none; clone3, whose flags a filter
# cannot read; new sockets, of whatever family; what is asked of schedulers, of memory's nodes, of keys of memory and of files' attributes,
# which GLib or a later QEMU tries and does without.
ANSWERED = (
    "io_uring_setup io_uring_enter io_uring_register clone3 socket socketpair openat2 userfaultfd capget "
    "sched_setattr sched_setscheduler sched_setparam sched_setaffinity setpriority getpriority ioprio_set ioprio_get "
    "mbind set_mempolicy get_mempolicy migrate_pages move_pages pkey_alloc pkey_free pkey_mprotect "
    "getxattr lgetxattr fgetxattr listxattr flistxattr fchmod chmod fchmodat syncfs sync "
    "inotify_init inotify_init1 inotify_add_watch io_setup io_submit io_getevents io_destroy sendfile splice"
)
# The highest number that is looked at one by one (set_mempolicy_home_node): later ones are answered in the same way, whatever they are.
KNOWN = 450


def header() -> str:
    """Returns C for calls.c: names, of which a C library's headers may not know all."""

    def rows(names: Iterable[str]) -> str:
        return "".join(f"#ifdef SYS_{name}\n    SYS_{name},\n#endif\n" for name in names)

    allowed = [name for names in ALLOWED.values() for name in names.split()]
    return (
        f"#define KNOWN {KNOWN}\nstatic const unsigned allowed[] = {{\n{rows(allowed)}}};\n"
        f"static const unsigned answered[] = {{\n{rows(ANSWERED.split())}}};\n"
    )
