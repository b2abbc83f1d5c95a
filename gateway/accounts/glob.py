"""Wildcards without backtracking: the pattern may be a stranger's (a session's policy), and the text another's.

All places of the pattern that the text so far can have led to are bits of one number (Baeza-Yates and Gonnet, "A new approach to text
searching", 1992), so that a match takes as many steps as the text has characters, whatever the pattern.
"""

from __future__ import annotations

from collections.abc import Iterable

# Elements beside characters: one or any number of them, of all or of all but a colon.
ONE, ONE_IN_PART, MANY, MANY_IN_PART = "?.", "?:", "*.", "*:"


def elements(text: str, one: str = ONE, many: str = MANY) -> list[str]:
    return [many if char == "*" else one if char == "?" else char for char in text]


class Glob:
    def __init__(self, given: Iterable[str]) -> None:
        pattern: list[str] = []
        for element in given:
            if pattern and {element, pattern[-1]} <= {MANY, MANY_IN_PART}:
                pattern[-1] = MANY if MANY in (element, pattern[-1]) else MANY_IN_PART
            else:
                pattern.append(element)
        self._text = "".join(pattern) if all(len(element) == 1 for element in pattern) else None  # nothing but itself
        self._is_all = pattern == [MANY]
        self._end = 1 << len(pattern)
        self._bits: dict[str, int] = {}
        for at, element in enumerate(pattern):
            self._bits[element] = self._bits.get(element, 0) | 1 << at
        self._many, self._many_in_part = self._bits.get(MANY, 0), self._bits.get(MANY_IN_PART, 0)
        self._one, self._one_in_part = self._bits.get(ONE, 0), self._bits.get(ONE_IN_PART, 0)

    def match(self, text: str) -> bool:
        if self._text is not None:
            return text == self._text
        if self._is_all:
            return True
        bits, many, one = self._bits, self._many, self._one
        anywhere = many | self._many_in_part
        many_in_part, one_in_part = anywhere, one | self._one_in_part
        places = 1 | (1 & anywhere) << 1
        for char in text:
            if char == ":":
                places = (places & many) | (places & (bits.get(char, 0) | one)) << 1
            else:
                places = (places & many_in_part) | (places & (bits.get(char, 0) | one_in_part)) << 1
            if not places:
                return False
            places |= (places & anywhere) << 1  # any number may be none
        return bool(places & self._end)
