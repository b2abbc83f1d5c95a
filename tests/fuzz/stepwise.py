"""What a fuzzer without guidance does not find: a parser of one word, a letter at a time."""

from __future__ import annotations


def check(data: bytes) -> None:
    if data[:1] != b"d":
        return
    if data[1:2] != b"e":
        return
    if data[2:3] != b"e":
        return
    if data[3:4] == b"p":
        raise ValueError("found")
