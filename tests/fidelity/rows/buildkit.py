"""What builds owe to BuildKit, and what is answered by a line where this one has it not."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

from fidelity.table import BASE, SERVER, Call, Get, Image, Logs, Run, Subject

_NAME = "public.ecr.aws/lambda/microvms"
_DIGEST = "@sha256:" + "0123456789abcdef" * 4
# One build has them all, since each row costs a microVM.
_ALL = f"""\
# syntax=docker/dockerfile:1.7
# escape=`
FROM --platform=linux/arm64 {_NAME}:al2023-minimal{_DIGEST} AS Build
RUN echo joined `
 by an escape directive > /joined
ONBUILD RUN touch /onbuild

FROM build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN [[ a == a ]] && ! (false | true)
RUN mkdir -p /kept/sub && echo image > /kept/file
RUN --mount=type=cache,target=/kept echo cached > /kept/other
RUN --mount=type=tmpfs,target=/kept true
RUN --mount=type=bind,source=one.txt,target=/kept/file grep -q first /kept/file
WORKDIR /app
RUN --mount=type=bind,source=one.txt,target=one.txt grep -q first one.txt
RUN <<EOF
set -e
echo a script > /heredoc
EOF
COPY <<-EOF /file
	a file of {{lines}}
	EOF
ARG ARCHIVE=tool.tar.gz
ENV TOOL=${{ARCHIVE%.gz}} TYPE=${{ARCHIVE##*.}}
COPY --link --chmod=0640 --chown=100000:999999 one.txt /linked
COPY --from={_NAME}{_DIGEST} /etc/os-release /release
RUN useradd -m -u 700000 far
RUN (find /sys/fs/cgroup -mindepth 1; cat /proc/self/cgroup) > /groups; (ulimit -Sn; ulimit -c) > /limits; ls /sys/class/net > /interfaces
VOLUME /volume
RUN mkdir -p /volume && echo seed > /volume/seed
VOLUME ["/made/by volume", "/volume"]
WORKDIR /not/there/yet
COPY server /server
EXPOSE 8080
CMD [[ a == a ]] && exec /server
"""
_LABS = r"torpor: --{} is of Dockerfile's labs channel, which BuildKit 0\.13 here does not have: "
_FAILED = r"(?s)\AThe container image build failed\.\n.*"


def _refused(name: str, title: str, lines: str, says: str, note: str = "", long: bool = False) -> Image:
    return Image(name, title, BASE + lines + SERVER, files={"one.txt": "first\n"}, fails=says, note=note, long=long)


def _tree() -> bytes:
    """A tar archive whose etc/hosts leads to a place that the builder has, too."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        link = tarfile.TarInfo("etc/hosts")
        link.type, link.linkname = tarfile.SYMTYPE, "/var/tmp/probe-of-hosts"
        archive.addfile(link)
    return out.getvalue()


def _nothing_is_written(running: Any) -> None:
    found = [path for path in (running.instance.root / "builds").rglob("probe-of-hosts")]
    assert not found and not Path("/var/tmp/probe-of-hosts").exists()


SUBJECT = Subject(
    "Builds",
    "BuildKit 0.13 builds, as Debian 13's dockerd has it; its plain progress is the build's log. Each account has a layer store and cache "
    "mounts of its own.",
    [
        Image(
            "buildkit",
            "what BuildKit has beyond a plain Dockerfile",
            _ALL,
            [
                Run("ONBUILD of a stage runs in the stage that stands on it", "ls /onbuild", "/onbuild"),
                Run("`# escape=` is seen behind `# syntax=`", "cat /joined", "joined by an escape directive"),
                Run("what an image has below a mount's target is there afterwards", "cd /kept; find . | sort; cat file", r"\.\n\./file\n\./sub\nimage"),
                Run("mount targets are relative to WORKDIR", "ls -A /app", ""),
                Run("here-documents are scripts and files", "cat /heredoc /file", "a script\na file of {lines}"),
                Run("substitution takes patterns", "echo $TOOL $TYPE", r"tool\.tar gz"),
                Run("COPY --link, --chown and --chmod", "stat -c '%u %g %a' /linked", "100000 999999 640"),
                Run("users beyond 65,535 own what is theirs", "stat -c %u /home/far", "700000"),
                Run("the base is a source of COPY by its digest", "test -s /release && echo yes", "yes"),
                Run("VOLUME keeps what RUN wrote there", "cat /volume/seed", "seed"),
                Run("VOLUME and WORKDIR make their directories", "ls -d '/made/by volume'; pwd", "/made/by volume\n/not/there/yet"),
                Run("a step sees its own control groups, and of no other", "grep -c memory /groups; grep -cE '/(torpor|image|build|pool)-' /groups", r"[1-9]\d*\n0", 1),
                Run("and its build's network", "cat /interfaces", "eth0\nlo"),
                Run("1024 open files are allowed, and core files", "cat /limits", "1024\nunlimited"),
                Run("nothing lent to steps is left", "ls -d /dev/.lent; env | grep -c lent", ".*No such file or directory\n0", 1),
                Logs("the log is BuildKit's plain progress", r"(?m)^#\d+ \[build 2/2\] RUN echo joined", build=True),
                Logs("the platform that is taken is said", "line 3: --platform=linux/arm64: this base is there for linux/", build=True),
            ],
            files={"one.txt": "first\n"},
        ),
        Image(
            "last-user",
            "a USER beyond a million",
            BASE + "RUN mkdir /mine && chown 1000730000 /mine\nUSER 1000730000\nRUN echo written > /mine/file\n"
            "COPY --chown=1000730000:0 server /server\nEXPOSE 8080\n" + 'CMD ["/server"]\n',
            [Run("runs steps, owns files and runs the application", "id -u; stat -c %u /mine/file /server", "1000730000\n1000730000\n1000730000")],
            note="one that the last stage's last USER names; others end at 1,000,000",
        ),
        Image(
            "scratch",
            "FROM scratch",
            "FROM scratch\nCOPY server /server\nVOLUME /data\nEXPOSE 8080\n" + 'CMD ["/server"]\n',
            [Get("nothing but the program is needed", "/env", contains="AWS_REGION")],
        ),
        Image(
            "step-fails",
            "a step that fails in a pipe under `SHELL … pipefail`",
            BASE + 'SHELL ["/bin/bash", "-o", "pipefail", "-c"]\nRUN echo before; (exit 3) | true\n' + SERVER,
            [
                Logs("the log has the step and what it printed", r"(?m)^#\d+ \[2/3\] RUN echo before; .*\n#\d+ [\d.]+ before$", build=True),
                Logs("the exit status ends it", r"ERROR: failed to solve: process .* did not complete successfully: exit code: 3", build=True),
                Logs("other builds are not named", absent="Successfully tagged", build=True),
            ],
            fails=_FAILED,
        ),
        _refused(
            "foreign-base", "an image that is neither the base nor pulled", "COPY --from=python:3.12-slim /x /x\n",
            _FAILED + r"torpor: python:3\.12-slim is not the base, .*images\.pull = true pulls them, and images\.base_names",
        ),
        _refused(
            "parents", "COPY --parents", "COPY --parents one.txt /x/\n", _FAILED + _LABS.format("parents"),
            "copy each directory to its own place", long=True,
        ),
        _refused(
            "exclude", "COPY --exclude", "COPY --exclude=*.txt . /x/\n", _FAILED + _LABS.format("exclude"), "write .dockerignore", long=True,
        ),
        _refused(
            "symbolic-mode", "COPY --chmod=+x", "COPY --chmod=+x one.txt /x\n",
            r"\ACONTAINER_BUILD_FAILED: Dockerfile, line 2: COPY --chmod=\+x: this BuildKit \(0\.13\) takes octal modes", "write --chmod=755",
        ),
        _refused(
            "far-owner", "an owner beyond a million", "COPY --chown=2000000 one.txt /x\n",
            r"\ACONTAINER_BUILD_FAILED: Dockerfile, line 2: COPY --chown=2000000: ids up to 1000000 can own files", long=True,
        ),
        _refused(
            "far-chown", "chown to an id beyond a million", "RUN touch /x && chown 2000000 /x\n",
            _FAILED + r"torpor: an owner is too large: ids up to 1000000", long=True,
        ),
        _refused(
            "endless-line", "a line of more than 64 KiB", f"RUN echo {'x' * 70_000}\nRUN false\n", _FAILED, "as Docker", long=True,
        ),
        Image(
            "front-end", "a front end of `# syntax=` that is not Docker's own", "# syntax=example.com/front:1\n" + BASE + SERVER,
            fails=r"\ACONTAINER_BUILD_FAILED: Dockerfile, line 1: # syntax= names the front end example\.com/front:1",
            note="taken where `images.pull` is on",
        ),
        Image(
            "own-sources",
            "apt's and pip's own sources of an image",
            BASE + "RUN dnf install -y python3-pip dpkg-dev\n"
            "RUN mkdir -p /repo/p/DEBIAN && cd /repo && printf 'Package: mine\\nVersion: 1\\nArchitecture: all\\nMaintainer: x <x@x>\\n"
            "Description: x\\n' > p/DEBIAN/control && dpkg-deb -b p mine.deb && dpkg-scanpackages . > Packages\n"
            "RUN echo 'deb [trusted=yes] file:///repo ./' > /etc/apt/sources.list.d/mine.list && apt-get update && apt-get install -y mine\n"
            "RUN pip config set global.find-links /wheels && pip config list > /pip && printf x > /own\n" + SERVER,
            [
                Run("a package of them is installed", "dpkg-query -W mine", "mine\t1"),
                Run("pip reads the user's settings in a step", "grep -c /wheels /pip", "1"),
                Run("the base's own sources are the image's again", "test -s /etc/apt/sources.list.d/torpor.sources && echo yes", "yes"),
            ],
            long=True,
        ),
        Image(
            "hosts-link",
            "an /etc/hosts that leads elsewhere",
            BASE + "ADD tree.tar /\nRUN test -s /etc/hosts\n" + SERVER,  # a step has a file of the builder's there
            [Call("the builder writes nothing through it", _nothing_is_written)],
            files={"tree.tar": _tree()},
            long=True,
        ),
    ],
)  # fmt: skip
