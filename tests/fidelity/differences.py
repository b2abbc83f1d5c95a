"""What an image and a process of it have here that they have not under Docker, or the other way round, with the reason.

test_reference.py finds every difference, and fails on one that does not stand here, and on one that stands here and is not found.
docs/images.md has this table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """`names` is a regular expression for what differs; `docker` and `ours`, for what each has."""

    about: str
    docker_has: str
    ours_has: str
    why: str
    names: str
    docker: str = ".*"
    ours: str = ".*"

    def is_it(self, name: str, docker: Any, ours: Any) -> bool:
        texts = ((self.names, name), (self.docker, repr(docker)), (self.ours, repr(ours)))
        return all(re.fullmatch(pattern, text, re.DOTALL) for pattern, text in texts)


FILES = [
    Difference(
        "the root directory", "of its time; FROM scratch has none", "of the time of the build, with ext4's lost+found, which the guest removes",
        "a microVM has a disk of its own, which is made once for all of them", r"/( time)?|/lost\+found",
    ),
    Difference(
        "devices below /dev in an image", "there, and hidden by the container's /dev", "not there, and /dev is made when a microVM starts",
        "nothing in a build may make devices", r"/dev/\w+", "{.*'type': 'character device'.*}", "None",
    ),
    Difference(
        "attributes `user.*` of what ADD unpacks", "in a container, and not in what `docker save` writes", "kept", "they are on the disk",
        r"/.* attributes( user\..*)?", "None", r"\{'user\..*|'[0-9a-f]*'",
    ),
]  # fmt: skip
PROCESS = [
    Difference(
        "environment", "HOSTNAME", "AWS_REGION, AWS_LAMBDA_MICROVM_IMAGE_ARN, _NAME and _VERSION", "as at the service",
        r"environment (HOSTNAME|AWS_\w+)",
    ),
    Difference("host name", "the container's id", "`localhost`", "as at the service", r"host name", ours="'localhost'"),
    Difference(
        "file systems", "an overlay; volumes, /etc/hosts, /etc/hostname and /etc/resolv.conf are mounts of their own",
        "one disk, on which all of these are", "a microVM is no container beside others of a host",
        r"mounts /(?!dev|proc|sys).*", "'(overlay|ext4|xfs|btrfs) .*'", "None|'ext4 .*'",
    ),
    Difference(
        "control groups", "version 1 or 2, as the host has them", "version 2", "the kernel is the microVM's own", r"(mounts|files) /sys/fs/cgroup.*",
    ),
    Difference(
        "seccomp", "a filter of system calls", "none", "a system call reaches the microVM's own kernel, and not the host's", r"status Seccomp", "'2'", "'0'",
    ),
    Difference(
        "/dev/console", "with `docker run --tty` only", "always; what is written there is in the log", "systemd and others write there",
        r"(devices|mounts) /dev/console", "None",
    ),
    Difference(
        "what is masked and read-only of /proc and /sys", "of these, what the host's kernel has", "of these, what a microVM's kernel has; /sys/firmware "
        "and /proc/acpi are mounted noexec, too", "kernels have different files there",
        r"(mounts|masked|read-only|devices) /(proc/(sysrq-trigger|kcore|acpi)|sys/(firmware|kernel/mm/ksm/run)|dev/core)",
        r"None|'tmpfs ro,.*'|'No such file or directory'|'Read-only file system'",
        r"'tmpfs .*'|'proc ro,.*'|'lrwxrwxrwx 0 0 /proc/kcore'|'nothing'|'Read-only file system'|'Permission denied'",
    ),
    Difference("/.dockerenv", "there", "not there", "this is no Docker", r"files /\.dockerenv", ".*", "'No such file or directory'"),
]  # fmt: skip
STEP = [
    Difference(
        "a RUN step's user namespace", "none", "a range of ids of the account's; what the kernel and the host give (/dev/null and its likes, /proc, "
        "/sys) is nobody's, 65534, there", "root in a build is not the host's root", r"id maps [ug]id_map|(devices|files) /(dev/\w+|proc|sys)",
        r"\['0', '0', .*\]|'.* 0 0( \d+:\d+)?'", r"\['0', .*\]|'.* 65534 65534( \d+:\d+)?'",
    ),
    Difference(
        "a RUN step's devices", "are made in its /dev, which `mknod` may, too", "are mounts; mknod of a device is refused", "nothing in a build may make devices",
        r"mounts /(dev/\w+|proc/(keys|timer_list))|what it may a device", "None|'tmpfs rw,nosuid'|'done'", "'devtmpfs rw,relatime'|'Operation not permitted'",
    ),
    Difference(
        "what the host lends to a RUN step", "nothing", "variables and /dev/.lent, by which apt, pip and TLS reach what the host reaches; the local base's own sources "
        "of apt are hidden by the host's", "a step installs packages where only the host knows the mirror; none of it is in the image",
        r"environment (APT_CONFIG|XDG_CONFIG_DIRS|\w+_(BUNDLE|CERT|CERTS|FILE|CAINFO))|(devices|mounts) /dev/\.lent|mounts /etc/apt/sources\.list\.d/torpor\.sources", "None",
    ),
    Difference(
        "a RUN step's control groups", "those of the host, version 1 or 2", "of the same version, those with the build's limits", "a build sees no other's",
        r"(mounts|files) /sys/fs/cgroup.*",
    ),
    Difference(
        "a RUN step's ports and pings", "root's capabilities bind ports below 1024 and open raw sockets",
        "every user binds every port and pings by an ICMP socket, as in `docker run`; raw sockets and sockets of packets are refused",
        "the build's network is the host's root's, so that no step changes its packet filter; with `--network=none` it is the step's, as under Docker",
        r"sysctl net/ipv4/(ip_unprivileged_port_start|ping_group_range)|what it may (a port below 1024|a ping|a raw socket|a socket of packets)",
        r"'1024'|'1\\t0'|'done'|'Permission denied'", r"'0'|'65534\\t65534'|'done'|'Operation not permitted'",
    ),
    Difference(
        "what is read-only for a RUN step below /proc/sys and /proc/irq", "is so by its mount", "belongs to another user, besides", "the user namespace",
        r"read-only /proc/.*", "'Read-only file system'", "'Permission denied'",
    ),
    Difference(
        "/sys of a RUN step with `--network=none`", "shows its own network, `lo`", "shows the build's, `lo` and `eth0`, to which it has no way",
        "a user namespace may not mount /sys afresh", "interfaces", r"\['lo'\]", r"\['eth0', 'lo'\]",
    ),
]  # fmt: skip
