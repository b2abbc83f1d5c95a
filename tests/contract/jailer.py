#!/usr/bin/python3
"""Firecracker's jailer as its documentation has it (docs/jailer.md): the same arguments, refusals and order of steps.

It differs in one thing: the root that it makes also shows /usr, so that what it starts, a Python program, finds its interpreter.
"""

import argparse
import ctypes
import os
import re
import resource
import shutil
import stat
import sys

VERSION = "1.16.2"
CLONE_NEWNS, CLONE_NEWNET, CLONE_NEWPID = 0x00020000, 0x40000000, 0x20000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
libc = ctypes.CDLL(None, use_errno=True)


def must(result: int, what: str) -> None:
    if result < 0:
        sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--version", action="store_true")
    for name in ("id", "exec-file"):
        parser.add_argument(f"--{name}", required="--version" not in sys.argv)
    for name in ("uid", "gid"):
        parser.add_argument(f"--{name}", type=int, required="--version" not in sys.argv)
    for name, default in (("cgroup-version", "1"), ("parent-cgroup", None), ("chroot-base-dir", "/srv/jailer"), ("netns", None)):
        parser.add_argument(f"--{name}", default=default)
    for name in ("cgroup", "resource-limit"):
        parser.add_argument(f"--{name}", action="append", default=[])
    for name in ("daemonize", "new-pid-ns"):
        parser.add_argument(f"--{name}", action="store_true")
    own, extra = sys.argv[1:], []
    if "--" in own:
        own, extra = own[: own.index("--")], own[own.index("--") + 1 :]
    found = parser.parse_args(own)
    found.extra = extra
    return found


def make_root(given: argparse.Namespace) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", given.id):
        sys.exit("Invalid instance ID")
    name = os.path.basename(given.exec_file)
    if not os.path.isfile(given.exec_file) or "firecracker" not in name:
        sys.exit(f"{given.exec_file} is not a file, or not named after firecracker")
    if not os.path.isdir(given.chroot_base_dir):
        sys.exit(f"{given.chroot_base_dir} is not a directory")
    if given.cgroup_version not in ("1", "2") or (given.parent_cgroup or "").startswith("/") or ".." in (given.parent_cgroup or ""):
        sys.exit("invalid control group")
    root = os.path.join(os.path.realpath(given.chroot_base_dir), name, given.id, "root")
    os.makedirs(root, exist_ok=True)
    shutil.copy(given.exec_file, os.path.join(root, name))
    return root


def enter(root: str, given: argparse.Namespace) -> None:
    limits = {"no-file": "2048"} | dict(one.split("=") for one in given.resource_limit)
    for name, value in limits.items():
        kind = {"no-file": resource.RLIMIT_NOFILE, "fsize": resource.RLIMIT_FSIZE}.get(name)
        if kind is None:
            sys.exit(f"Invalid resource argument: {name}")
        resource.setrlimit(kind, (int(value), int(value)))
    namespace = os.open(given.netns, os.O_RDONLY) if given.netns else None
    must(libc.unshare(CLONE_NEWNS), "unshare")
    must(libc.mount(None, b"/", None, MS_PRIVATE | MS_REC, None), "private mounts")
    os.mkdir(os.path.join(root, "usr"))
    must(libc.mount(b"/usr", os.path.join(root, "usr").encode(), None, MS_BIND | MS_REC, None), "usr")
    for link in ("lib", "lib64", "bin"):
        os.symlink(f"usr/{link}", os.path.join(root, link))
    os.chroot(root)
    os.chdir("/")
    os.makedirs("/dev/net")
    for device, major, minor in (("/dev/net/tun", 10, 200), ("/dev/kvm", 10, 232)):
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(major, minor))
        os.chown(device, given.uid, given.gid)
    os.chown("/", given.uid, given.gid)
    if namespace is not None:
        must(libc.setns(namespace, CLONE_NEWNET), "setns")
        os.close(namespace)


def main() -> None:
    given = arguments()
    if given.version:
        print(f"Jailer v{VERSION}")
        return
    os.closerange(3, 4096)
    os.environ.clear()
    root = make_root(given)
    enter(root, given)
    name = os.path.basename(given.exec_file)
    if given.new_pid_ns:
        must(libc.unshare(CLONE_NEWPID), "new pid namespace")
        leads = os.getsid(0) == os.getpid()
        child = os.fork()
        if not child and leads:  # so that the end of the session that it leaves is no SIGHUP for it
            os.setsid()
        if child:
            with open(f"/{name}.pid", "x", encoding="ascii") as file:
                file.write(str(child))
            return
    else:
        with open(f"/{name}.pid", "x", encoding="ascii") as file:
            file.write(str(os.getpid()))
    os.setgroups([])
    os.setresgid(given.gid, given.gid, given.gid)
    os.setresuid(given.uid, given.uid, given.uid)
    os.execv(f"/{name}", [f"/{name}", "--id", given.id, "--start-time-us", "1", "--start-time-cpu-us", "1", *given.extra])


main()
