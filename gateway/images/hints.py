"""What to do about a container build that failed: lines of our own behind BuildKit's, where its words do not say it.

BuildKit's log stays as it is, since clients parse it; these lines begin with "torpor:" as all of ours.
"""

from __future__ import annotations

import re

from .dockerfile import UIDS

_LABS = "is of Dockerfile's labs channel, which BuildKit 0.13 here does not have"
_INSTEAD = {
    "parents": "copy each directory to its own place, or the whole of it and RUN rm what is too much",
    "exclude": "name what is not wanted in .dockerignore, or RUN rm it",
    "security": "steps have root and Docker's default capabilities",
    "device": "steps have no devices of the host",
}
_OWNERS = f"ids up to {UIDS} can own files and run steps, and the one that the last USER names"


def _denied(match: re.Match[str]) -> str:
    name = match[1].removeprefix("docker.io/").removeprefix("library/")
    return (
        f"{name} is not the base, and other images are not pulled here: images.pull = true pulls them, "
        "and images.base_names lists the names that mean it"
    )


def _flag(match: re.Match[str]) -> str:
    name = match[1]
    return f"--{name} {_LABS}: {_INSTEAD[name]}" if name in _INSTEAD else f"--{name} is no flag that BuildKit 0.13 knows"


_HINTS = (
    (re.compile(r'source "docker-image://([^"]+)" denied by policy'), _denied),
    (re.compile(r"dockerfile parse error on line \d+: unknown flag: ([\w-]+)"), _flag),
    (re.compile(r"lchown [^\n]*: invalid argument"), lambda match: f"a file's owner is too large: {_OWNERS}"),
    (re.compile(r"unable to setup user: invalid argument"), lambda match: f"a step's USER is too large: {_OWNERS}"),
    (
        re.compile(r"(?:[Cc]annot change ownership|changing ownership)[^\n]*: Invalid argument"),
        lambda match: f"an owner is too large: {_OWNERS}",
    ),
    (
        re.compile(r"Could not allocate (?:block|inode)[^\n]* in ext2 filesystem"),
        lambda match: "the image's files do not fit the MicroVM's disk: 8 GiB, or 16 and 32 with resources of 4096 and 8192 MiB",
    ),
    (
        re.compile(r'exec: "git": executable file not found'),
        lambda match: "ADD and COPY take no git repositories here: RUN git clone in a stage, or put the files into the artifact",
    ),
)


def hints(said: str) -> list[str]:
    """For the end of a failed build's log."""
    return [say(match) for pattern, say in _HINTS if (match := pattern.search(said)) is not None]
