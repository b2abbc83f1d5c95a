"""What a host has too little of is named, with what to do about it."""

from __future__ import annotations

import errno
import os

import pytest

from vmm.errors import DiskFull, Unavailable, explained, not_written


@pytest.mark.parametrize(
    ("number", "names"),
    [(errno.EMFILE, "LimitNOFILE"), (errno.ENFILE, "fs.file-max"), (errno.EAGAIN, "kernel.pid_max"), (errno.ENOMEM, "no memory left")],
)
def test_a_resource_is_named(number: int, names: str) -> None:
    error = OSError(number, os.strerror(number))
    for told in (explained(error, f"the hypervisor did not start: {error}"), not_written(error, "image a", "image a could not be stored")):
        assert type(told) is Unavailable and os.strerror(number) in str(told) and str(told).endswith(")") and names in str(told)


def test_what_is_not_scarce_is_told_as_it_is() -> None:
    assert str(explained(OSError(errno.EIO, "Input/output error"), "x")) == "x" == str(explained(TimeoutError(), "x"))
    assert type(not_written(OSError(errno.EDQUOT, "quota"), "image a", "")) is DiskFull
