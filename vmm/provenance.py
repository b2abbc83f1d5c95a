"""What made a state: a guest's memory and devices are loaded by what wrote them, or not at all.

QEMU's states pass between versions of one machine type (QEMU: docs/devel/migration/compatibility.rst), but nobody tests that for each
pair; a sleeper is somebody's work, so it is given to the version that wrote it (vmm/qemu/roots.py) and to no other.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Provenance(msgspec.Struct, frozen=True):
    """`version` is the hypervisor's as it says it itself, its package's revision included; `machine` a machine type with a version; `root`
    the directory that it ran from. `features`: the words of CPUID that its guest sees (leaf, register, value).

    The defaults are what commit 165a0cb made, which recorded nothing of this: the QEMU that stood in CACHE/qemu-root, of a version that was
    not written down (7.2 on Debian 12), with the machine that it calls q35, and an agent of protocol 1.
    """

    hypervisor: str = "qemu"
    version: str = ""
    machine: str = ""
    root: str = ""
    processor: str = ""  # the model, as its command line names it
    features: list[str] = []
    model: str = ""  # of the host's processor, where KVM lends it
    kernel: str = ""  # the guest's: release, and its package's version
    agent: str = ""  # of the guest's init, the SHA-256's first digits
    protocol: int = 1  # which the agent speaks

    def in_words(self) -> str:
        name = {"qemu": "QEMU", "firecracker": "Firecracker"}.get(self.hypervisor, self.hypervisor)
        return f"{name} {self.version or 'of a version that was not recorded'}"


def lacking(wanted: Iterable[str], found: Iterable[str]) -> list[str]:
    """Returns which words of CPUID miss features that a guest has seen. A guest does not ask again, and one that uses what is not there
    faults; what is there beyond that it never notices."""
    there = dict(word.split("=") for word in found)
    return [word for word in wanted for name, value in [word.split("=")] if int(value, 16) & ~int(there.get(name, "0"), 16)]
