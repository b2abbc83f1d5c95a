"""What can go wrong on the host, typed."""

from __future__ import annotations


class VmmError(Exception):
    """Something on the host failed; the text says what, where and what to do."""


class DiskFull(VmmError):
    """A file could not be written for want of room."""


class StateLost(VmmError):
    """A session's hypervisor ended, or its snapshot cannot be read."""
