"""Account quotas by profile: rates as token buckets, sizes as counts (service reference, 8: Lambda MicroVMs quotas).

`none`, the default, leaves everything but what settings bound to what the host can hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from gateway.config import Limits


@dataclass(frozen=True)
class Profile:
    """`rates`: calls a second by operation; 0 or absent: no limit. The burst is the rate. The service bounds neither the number of microVMs
    nor their disks."""

    memory_mib: int = 0
    microvms: int = 0
    disk_gib: int = 0
    images: int = 0
    versions: int = 0
    builds: int = 0
    rates: dict[str, float] = field(default_factory=dict)
    read_rate: float = 0


PROFILES = {
    "none": Profile(),
    "aws": Profile(
        400 * 1024, 0, 0, 100, 50, 5,
        {"RunMicrovm": 5, "ResumeMicrovm": 5, "SuspendMicrovm": 2, "TerminateMicrovm": 10, "CreateMicrovmAuthToken": 50,
         "CreateMicrovmShellAuthToken": 5}, 100,
    ),
    "small": Profile(
        8 * 1024, 0, 0, 100, 50, 1,
        {"RunMicrovm": 1, "ResumeMicrovm": 1, "SuspendMicrovm": 1, "TerminateMicrovm": 1, "CreateMicrovmAuthToken": 10,
         "CreateMicrovmShellAuthToken": 1}, 20,
    ),
}  # fmt: skip

RUN_CODE, MEMORY_CODE, DURATION_CODE = "L-91B95582", "L-CD1C0CC4", "L-B430C318"
LONGEST_LIFE_SECONDS = 28_800  # of a microVM's life
MOST_CONNECTORS = 100
DISK_GIB = {512: 8, 1024: 8, 2048: 8, 4096: 16, 8192: 32}  # of a microVM, by its image's minimum size in MiB (reference, section 4)
# Codes that are not public are ours: no AWS code has their form.
_RATE_CODES = {
    "RunMicrovm": RUN_CODE, "ResumeMicrovm": "resume-microvm-rate", "SuspendMicrovm": "suspend-microvm-rate",
    "TerminateMicrovm": "terminate-microvm-rate", "CreateMicrovmAuthToken": "auth-token-rate",
    "CreateMicrovmShellAuthToken": "shell-auth-token-rate",
}  # fmt: skip


@dataclass(frozen=True)
class Quota:
    """One quota of an account, as AWS Service Quotas describes it."""

    code: str
    name: str
    value: float
    unit: str = "None"
    is_rate: bool = False


def disk_gib(minimum_mib: int) -> int:
    return DISK_GIB.get(minimum_mib, 0)  # of a session from before sizes were kept


def of(limits: Limits) -> Profile:
    """Returns the profile that the settings name, with their own numbers."""
    profile = PROFILES[limits.profile]
    return replace(
        profile, memory_mib=limits.memory_mib or profile.memory_mib, microvms=limits.microvms, disk_gib=limits.disk_gib,
        builds=profile.builds or limits.builds,
    )  # fmt: skip


def limited(profile: Profile) -> list[Quota]:
    """Returns what of an account is limited."""
    found = [
        Quota(MEMORY_CODE, "MicroVM memory, running and suspended", profile.memory_mib / 1024, "Gigabytes"),
        Quota("microvms", "MicroVMs, running and suspended", profile.microvms),
        Quota("microvm-disk", "MicroVM disk, running and suspended", profile.disk_gib, "Gigabytes"),
        Quota(DURATION_CODE, "Maximum duration of a MicroVM", LONGEST_LIFE_SECONDS, "Seconds"),
        Quota("microvm-images", "MicroVM images", profile.images),
        Quota("microvm-image-versions", "Versions of a MicroVM image", profile.versions),
        Quota("microvm-image-builds", "Concurrent MicroVM image builds, those that wait included", profile.builds),
        Quota("network-connectors", "Network connectors", MOST_CONNECTORS),
        Quota("read-rate", "Rate of Get and List requests", profile.read_rate, is_rate=True),
        *(Quota(code, f"Rate of {name} requests", profile.rates.get(name, 0), is_rate=True) for name, code in _RATE_CODES.items()),
    ]
    return [quota for quota in found if quota.value]


class Buckets:
    """One token bucket for each account and operation (reads share one)."""

    def __init__(self, profile: Profile, clock: Callable[[], float] = time.monotonic) -> None:
        self._profile = profile
        self._clock = clock
        self._levels: dict[tuple[str, str], tuple[float, float]] = {}

    def wait_seconds(self, account: str, operation: str) -> float:
        """Takes one token: 0.0, or how long until there is one."""
        name = operation if operation in self._profile.rates else "reads" if operation.startswith(("Get", "List")) else ""
        rate = self._profile.rates.get(name, self._profile.read_rate if name == "reads" else 0)
        if not rate:
            return 0.0
        now = self._clock()
        level, at = self._levels.get((account, name), (rate, now))
        level = min(rate, level + (now - at) * rate)
        taken = level >= 1
        self._levels[account, name] = (level - 1 if taken else level, now)
        return 0.0 if taken else (1 - level) / rate
