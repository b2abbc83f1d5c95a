"""A .dockerignore (gateway/cli/context.py): a path is in it or not, found by folders or at once."""

from __future__ import annotations

import contextlib
import random
import warnings

from gateway.cli.context import ContextError, Ignored

TRACED = ("gateway.cli.context",)
WORDS = (
    b"\n",
    b"!",
    b"**",
    b"*",
    b"?",
    b"/",
    b"**/",
    b"/**",
    b"[a-z]",
    b"[^a]",
    b"[]a]",
    b"[",
    b"[[",
    b"[z-a]",
    b"\\",
    b"#",
    b"..",
    b"a",
    b".git",
    b"node_modules",
    b"\xff",
    b"[a--b]",
    b"[a&&b]",
    b"[a||b]",
)
_PATHS = ("a", "a/b", "a/b/c", "x.py", "a/x.py", "node_modules/m/i.js", ".git", "..", "deep/" * 12 + "f", "a" * 14, "a\nb", "]", "[")


def seeds() -> list[bytes]:
    return [
        b".git\nnode_modules\n*.py\n!a/x.py\n",
        b"**/*.js\n**/c\na/**\n!a/b\n",
        b"# a comment\n/a/../b\n[a-c]?\n\\*\n",
        b"*\n!deep/**/f\n",
    ]


def make(rng: random.Random) -> bytes:
    return "\n".join(
        "".join(rng.choices(("a", "b", "*", "**", "/", "?", "!", "[ab]", "\\", "."), k=rng.randrange(1, 8)))
        for _ in range(rng.randrange(1, 5))
    ).encode()


def check(data: bytes) -> None:
    # A line of many stars takes long, as any expression does that tries them all: it is the user's own, and so is the time.
    text = "\n".join(line for line in data[:300].decode("utf-8", errors="replace").split("\n") if line.replace("**", "").count("*") < 7)
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(ContextError):
        ignored = Ignored(text)
        for path in _PATHS:
            folder, _, _ = path.rpartition("/")
            is_in = path in ignored
            if folder and folder in ignored and not is_in:
                assert ignored.may_spare(folder), f"{path} is spared in a folder that is not looked into"
        assert not Ignored(text + "\n!**\n!*") or "a" not in Ignored(text + "\n!**\n!*"), "the last pattern does not decide"
