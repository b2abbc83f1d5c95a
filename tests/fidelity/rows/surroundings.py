"""What an application finds when it starts, and how it ends: as under Docker (vmm/guest/container.c, start.c)."""

import io
import re
import struct
import tarfile
import time
from typing import Any

from fidelity.table import BASE, SERVER, Call, Get, Image, Logs, Run, Subject

_FIRST_LINES = "images that do not start say why"


def _links(**targets: str) -> bytes:
    """A tar archive of symbolic links."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, target in targets.items():
            link = tarfile.TarInfo(name.replace("_", "/", 1).replace("_", "."))
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
    return out.getvalue()


def _elf(machine: int) -> bytes:
    return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 2, machine, 1) + bytes(100)


def _ends(word: str) -> Call:
    """The microVM is terminated, and the application's last word must be in the log."""

    def check(running: Any) -> None:
        vm = running.started()
        running.instance.terminate(vm["microvmId"])
        assert re.search(word, running.log()), running.log()

    return Call("the application has the time to end by itself", check)


def _is_not_waited_for(running: Any) -> None:
    """The grace time is 10 s."""
    vm, begun = running.started(), time.monotonic()
    running.instance.terminate(vm["microvmId"])
    assert time.monotonic() - begun < 8


def _waits(signal: str) -> str:
    return f'CMD ["/bin/sh", "-c", "trap \'echo it was {signal}; exit 0\' {signal}; /server & wait; wait"]\n'


def _refused(name: str, title: str, dockerfile: str, says: str, files: dict[str, str | bytes] | None = None, long: bool = True) -> Image:
    return Image(name, f"{_FIRST_LINES}: {title}", dockerfile, files=files or {}, fails=says, long=long)


SUBJECT = Subject(
    "What an application finds",
    "Files, devices, limits and the end of an application are what `docker run` gives. The host name is `localhost` in every microVM, as at the "
    "service. `/proc/sys` and parts of `/proc` and `/sys` are read-only or masked, unless the image has `additionalOsCapabilities` ALL.",
    [
        Image(
            "surroundings",
            "directories, devices, limits",
            BASE + "RUN install -d -o 33 -m 750 /run/app && echo kept > /run/app/file && ln -s app /run/link && touch /var/lock/mine\n"
            "COPY target /target\nADD links.tar /\n" + SERVER + "VOLUME /data /srv/deep/volume\nWORKDIR /made/here\n",
            [
                Run("/run is the image's", "stat -c '%u %a' /run/app; cat /run/link/file /var/run/app/file", "33 750\nkept\nkept"),
                Run(
                    "/run/lock and /run/user are there",
                    "ls /var/lock/mine && touch /run/lock/x && stat -c %a /run/lock /run/user",
                    "/var/lock/mine\n1777\n755",
                ),
                Run("WORKDIR is made", "pwd; stat -c '%U %a' .", "/made/here\nroot 755"),
                Run("VOLUME's directories are made", "touch /data/x /srv/deep/volume/x && echo yes", "yes"),
                Run(
                    "names resolve whatever links the image has",
                    "stat -c '%F' /etc/resolv.conf /etc/hosts; grep -c nameserver /etc/resolv.conf; cat /target",
                    "regular file\nregular file\n1\nuntouched",
                ),
                Run(
                    "the host has a name",
                    "hostname; cat /etc/hostname; getent hosts $(hostname) | grep -c localhost",
                    "localhost\nlocalhost\n1",
                ),
                Run("1024 files are open to all, 524,288 to who asks", "ulimit -Sn; ulimit -n 524288 && ulimit -n", "1024\n524288"),
                Run("processes are not counted", "grep -c '^Max processes *unlimited *unlimited' /proc/self/limits", "1"),
                Run(
                    "memory maps and file watches suffice for search engines and watchers",
                    "cat /proc/sys/vm/max_map_count /proc/sys/fs/inotify/max_user_watches /proc/sys/net/core/somaxconn",
                    "1048576\n524288\n4096",
                ),
                Run(
                    "/dev has Docker's devices",
                    "ls /dev | tr '\\n' ' '",
                    "console core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero",
                ),
                Run(
                    "/dev/shm and /dev/mqueue are mounted",
                    "awk '$2 ~ /^.dev.(shm|mqueue)$/ {print $3}' /proc/mounts | sort",
                    "mqueue\ntmpfs",
                ),
                Run(
                    "/proc/sys, /proc/sysrq-trigger and /sys are read-only",
                    "for f in /proc/sys/vm/swappiness /proc/sysrq-trigger /sys/power/state; do (echo 0 > $f) 2>&1 | grep -o 'Read-only.*'; done",
                    "(Read-only file system\n?){3}",
                ),
                Run(
                    "/proc/keys, /proc/kcore, /proc/timer_list and /sys/firmware are masked",
                    "cat /proc/keys /proc/kcore /proc/timer_list | wc -c; ls /sys/firmware | wc -l",
                    "0\n0",
                ),
                Run("mkfs's lost+found is not there", "ls -d /lost+found 2>/dev/null; cat /etc/mtab | head -1 | cut -d' ' -f2", "/"),
            ],
            files={
                "links.tar": _links(etc_resolv_conf="../run/systemd/resolve/stub-resolv.conf", etc_hosts="../target"),
                "target": "untouched",
            },
        ),
        Image(
            "surroundings-all",
            "with all capabilities",
            BASE + SERVER,
            [
                Run(
                    "/proc and /sys are whole",
                    "echo 60 > /proc/sys/vm/swappiness && cat /proc/sys/vm/swappiness; ls /sys/firmware | wc -l; wc -c < /proc/timer_list",
                    "60\n[1-9][0-9]*\n[1-9][0-9]*",
                ),
                Run(
                    "/dev is the kernel's",
                    "awk '$2 == \"/dev\" {print $3}' /proc/mounts; ls /dev/vda /dev/console",
                    "devtmpfs\n/dev/console\n/dev/vda",
                ),
                Run("the host may be named", "hostname other && hostname", "other"),
            ],
            request={"additionalOsCapabilities": ["ALL"]},
            long=True,
        ),
        Image(
            "surroundings-acl",
            "access control lists",
            BASE + "RUN dnf install -y acl && touch /file && chmod 600 /file && setfacl -m u:33:r /file\n" + SERVER,
            [Run("are kept", "getfacl -nc /file 2>/dev/null | grep user:", "user::rw-\nuser:33:r--")],
            long=True,
        ),
        Image(
            "streams",
            "standard streams of a USER who is not root",
            BASE + "COPY server /server\nUSER nobody\nEXPOSE 8080\n"
            "CMD echo one > /dev/stdout && echo two > /dev/stderr && echo three > /proc/self/fd/1 && echo four > /dev/fd/2 && "
            "echo five > /dev/console && exec /server\n",
            [
                Logs(
                    "/dev/stdout, /dev/stderr, /proc/self/fd/1 and /dev/console can be opened, and are in the log",
                    "".join(rf"(?=[\s\S]*\n{word}(\n|$))" for word in ("one", "two", "three", "four", "five")),  # no order between streams
                    build=True,
                ),
                Run("USER may ask for more open files", "id -un; ulimit -n 65536 && ulimit -n", "nobody\n65536"),
            ],
        ),
        Image(
            "scratch-links",
            "FROM scratch, with links where directories are expected",
            'FROM scratch\nADD links.tar /\nCOPY server /server\nWORKDIR /a/b\nEXPOSE 8080\nENTRYPOINT ["/server"]\n',
            [
                Get("it serves, and has what Docker adds", "/cat?/etc/hosts", contains="127.0.0.1\tlocalhost"),
                Get("its environment has PATH and HOME", "/env", contains="(HOME=/\n(.*\n)*PATH=/usr)|(PATH=/usr.*\n(.*\n)*HOME=/\n)"),
                Call("an application that heeds no signal is not waited for", _is_not_waited_for),
            ],
            files={"links.tar": _links(etc="/nowhere", dev="x", proc="/y", tmp="/z")},
        ),
        Image(
            "loopback6",
            "an application that listens on ::1 only (Vite, Node's `localhost`)",
            BASE + 'COPY server /server\nEXPOSE 8080\nCMD ["/server", "8080", "::1"]\n',
            [
                Get("is reached", contains="hello"),
                Run(
                    "and sees its peer as local",
                    "cut -d' ' -f4-8 /proc/net/tcp6 | grep -c '00000000000000000000000001000000:1F90 00000000000000000000000001000000'",
                    "[1-9]",
                ),
                Run("IPv6 is on the loopback only", "cut -c 33- /proc/net/if_inet6", "01 80 10 80 +lo"),
                Logs("the build sees that it listens", absent="nothing listens", build=True),
            ],
        ),
        Image(
            "words",
            "many variables and arguments",
            BASE
            + "ENV "
            + " ".join(f"V{number}={number}" for number in range(600))
            + "\nCOPY server /server\nEXPOSE 8080\nENTRYPOINT "
            + str(["/bin/sh", "-c", "echo $# words; exec /server", *map(str, range(600))]).replace("'", '"')
            + "\n",
            [
                Get("all of them arrive", "/env", contains="V599=599"),
                Get("the request's own too", "/env", contains="OWN=yes"),
                Logs("arguments too", "599 words", build=True),
            ],
            request={"environmentVariables": {"OWN": "yes"}},
        ),
        Image(
            "stop-signal",
            "STOPSIGNAL",
            BASE + "COPY server /server\nSTOPSIGNAL SIGQUIT\nEXPOSE 8080\n" + _waits("QUIT"),
            [_ends("it was QUIT")],
            note="sent at TerminateMicrovm and at the end of a lifetime, behind the terminate hook; `sessions.stop_seconds` (10) is its time",
        ),
        Image("stop-term", "SIGTERM", BASE + "COPY server /server\nEXPOSE 8080\n" + _waits("TERM"), [_ends("it was TERM")], long=True),
        _refused(
            "start-mode",
            "no x bit",
            BASE + 'COPY --chmod=644 app /app\nCMD ["/app"]\n',
            r"/app may not be executed by anybody \(its mode is 0644\)",
            {"app": "#!/bin/sh\n"},
            long=False,
        ),
        _refused(
            "start-crlf",
            "Windows' line ends",
            BASE + 'COPY --chmod=755 app /app\nCMD ["/app"]\n',
            r"/app has Windows' line ends",
            {"app": "#!/bin/sh\r\necho\r\n"},
        ),
        _refused(
            "start-shell-form",
            "a script that a shell starts",
            BASE + "COPY --chmod=755 app /app/start\nWORKDIR /app\nCMD ./start now\n",
            r"\./start has Windows' line ends",
            {"app": "#!/bin/sh\r\necho\r\n"},
        ),
        _refused(
            "start-machine",
            "another processor",
            BASE + 'COPY --chmod=755 app /app\nCMD ["/app"]\n',
            r"/app is built for aarch64 \(linux/arm64\)",
            {"app": _elf(183)},
        ),
        _refused(
            "start-interpreter",
            "no interpreter",
            BASE + 'COPY --chmod=755 app /app\nCMD ["/app"]\n',
            "/app is a script for /usr/bin/nosuch, which is not",
            {"app": "#!/usr/bin/nosuch -x\n"},
        ),
        _refused(
            "start-loader",
            "another C library",
            BASE + 'RUN sed s/ld-linux-x86-64.so.2/ld-linux-x86-64.so.9/ /bin/true > /app && chmod 755 /app\nCMD ["/app"]\n',
            "/app needs the loader /lib64/ld-linux-x86-64.so.9, which is not",
        ),
        _refused(
            "start-shell",
            "shell form without a shell",
            "FROM scratch\nCOPY server /server\nCMD /server\n",
            "the image has no /bin/sh, which a CMD",
        ),
        _refused("start-path", "not in PATH", BASE + 'CMD ["nosuchprogram"]\n', "no directory of PATH has nosuchprogram"),
        _refused(
            "start-user", "no such user", BASE + 'USER nosuch\nCMD ["/bin/true"]\n', "USER nosuch: the image's /etc/passwd has no such user"
        ),
        _refused(
            "start-words",
            "more than the kernel takes",
            BASE + f"ENV A={'x' * 50000}\nENV LONG=$A$A$A\n" + 'CMD ["/bin/true"]\n',
            "LONG has 150005 bytes: the kernel takes an argument or variable of 131071 at most",
        ),
        Image(
            "systemd-plain",
            "systemd without `additionalOsCapabilities` ALL",
            BASE + 'RUN dnf install -y systemd\nEXPOSE 8080\nCMD ["/lib/systemd/systemd"]\n',
            [
                Logs("the log says what to do", "is systemd, which mounts file systems and needs all capabilities", build=True),
                Logs("and has what systemd writes to /dev/console", "Failed to mount API filesystems", build=True),
            ],
            long=True,
        ),
    ],
)
