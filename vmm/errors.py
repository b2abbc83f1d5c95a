"""What can go wrong on the host, typed."""

from __future__ import annotations

import errno


class VmmError(Exception):
    """Something on the host failed; the text says what, where and what to do."""


class DiskFull(VmmError):
    """A file could not be written for want of room."""


class StateLost(VmmError):
    """A session's hypervisor ended, or its snapshot cannot be read."""


def not_written(error: Exception, what: str, otherwise: str) -> VmmError:
    """DiskFull where there was no room for `what`, else `otherwise` with the error's own words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"no room for {what}: free some, or move --root")
    return VmmError(f"{otherwise}: {error}")
