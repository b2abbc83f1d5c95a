"""Token buckets of Firecracker's devices (RateLimiter in its API's description): what a device does in a second, and no more.

They are part of a device's state, so a load brings those of the host that saved it; they are set anew before the guest runs. A bucket
without tokens stands for no limit.
"""

from __future__ import annotations

from gateway.config import Devices

_REFILL_MS = 1000
# Of the entropy device: enough to seed any number of programs. A guest that asks for more has its host's processors make it.
ENTROPY_BYTES = 64 << 10

Limiter = dict[str, dict[str, int]]


def _limiter(bytes_a_second: int, operations_a_second: int) -> Limiter:
    """Both buckets are named, since one that is left out stays as it was."""
    rates = {"bandwidth": bytes_a_second, "ops": operations_a_second}
    return {name: {"size": rate, "refill_time": _REFILL_MS if rate else 0} for name, rate in rates.items()}


def disk(limits: Devices) -> Limiter:
    return _limiter(limits.disk_mib_per_second << 20, limits.disk_operations_per_second)


def link(limits: Devices) -> Limiter:
    """Of one direction."""
    return _limiter(limits.network_mib_per_second << 20, limits.network_packets_per_second)


def entropy() -> Limiter:
    return {"bandwidth": {"size": ENTROPY_BYTES, "refill_time": _REFILL_MS}}
