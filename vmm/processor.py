"""What a guest under KVM sees of the host's processor, and whether a state can be loaded where another one is.

A guest looks when it boots: its kernel and its libraries choose their code by what they find, and do not look again. Neither QEMU's
`-cpu host` nor Firecracker without a template has a version, so the processor itself is written down: its model, and each feature that
KVM lends. States pass between hosts of one model (Firecracker: docs/snapshotting/versioning.md, CPU model), whose KVM lends as much.

What no guest sees is that processor's virtualisation: KVM runs none in a guest whose CPUID does not offer it (kvm_valid_efer and
nested_vmx_allowed of its source), and its code for guests in guests has let guests out. Guests that booted before keep what they saw.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from .errors import Refused
from .provenance import Provenance, lacking

KVM = Path("/dev/kvm")
_KVM_GET_SUPPORTED_CPUID = 0xC008AE05  # linux/kvm.h
_MOST_ENTRIES = 256
_HEAD, _ENTRY = struct.Struct("<II"), struct.Struct("<10I")  # kvm_cpuid2, kvm_cpuid_entry2
_REGISTERS = ("EAX", "EBX", "ECX", "EDX")
# The words of CPUID in which each bit is a feature, by leaf and index; KVM's own are at 0x40000001.
_FEATURES = {
    (0x1, 0): ("ECX", "EDX"),
    (0x7, 0): ("EBX", "ECX", "EDX"),
    (0x7, 1): ("EAX",),
    (0xD, 0): ("EAX",),
    (0xD, 1): ("EAX",),
    (0x40000001, 0): ("EAX",),
    (0x80000001, 0): ("ECX", "EDX"),
    (0x80000007, 0): ("EDX",),
    (0x80000008, 0): ("EBX",),
}
FIRECRACKER = "host,vmx=off,svm=off"  # a guest's model, as QEMU would name it
_VIRTUALISATION = {"1.0.ECX": 1 << 5, "80000001.0.ECX": 1 << 2}  # vmx of Intel's, svm of AMD's
# The same for Firecracker (docs/cpu_templates/cpu-templates.md of its repository): what is left out of a bitmap stays as it is.
MODIFIERS = [
    {"leaf": leaf, "subleaf": "0x0", "flags": 0, "modifiers": [{"register": "ecx", "bitmap": bits}]}
    for leaf, bits in (("0x1", "0b0xxxxx"), ("0x80000001", "0b0xx"))
]


def model(root: Path = Path("/")) -> str:
    """Returns vendor, family and model of the host's first processor; empty where Linux does not say. `root` is where /proc is."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    if "vendor_id" not in found:
        return ""
    return f"{found['vendor_id']} family {found.get('cpu family', '?')} model {found.get('model', '?')}"


def lent(device: Path = KVM) -> list[str]:
    """Returns the words of features that KVM lends to guests, as leaf.index.register=value. Raises OSError."""
    buffer = bytearray(_HEAD.pack(_MOST_ENTRIES, 0) + bytes(_MOST_ENTRIES * _ENTRY.size))
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _KVM_GET_SUPPORTED_CPUID, buffer, True)
    finally:
        os.close(descriptor)
    return words(bytes(buffer))


def words(answer: bytes) -> list[str]:
    """Of what KVM answered."""
    (count, _), found = _HEAD.unpack_from(answer), []
    for number in range(count):
        leaf, index, _, *registers = _ENTRY.unpack_from(answer, _HEAD.size + number * _ENTRY.size)[:7]
        values = dict(zip(_REGISTERS, registers, strict=True))
        found += [f"{leaf:x}.{index:x}.{name}={values[name]:x}" for name in _FEATURES.get((leaf, index), ()) if values[name]]
    return found


def shown(features: list[str]) -> list[str]:
    """Returns of the words that KVM lends those that a guest sees."""
    there = {name: int(value, 16) & ~_VIRTUALISATION.get(name, 0) for name, value in (word.split("=") for word in features)}
    return [f"{name}={value:x}" for name, value in there.items() if value]


def virtualises(model: str) -> bool:
    """Whether a guest of that model sees the virtualisation of its processor, as far as that has any."""
    return "svm=off" not in model.split(",")


def check(what: str, made: Provenance, here: str, features: list[str]) -> None:
    """`here` is this host's model, `features` are the words that a guest sees here. What was not written down is not compared. Raises
    Refused."""
    if made.model and here and made.model != here:
        raise Refused(
            f"{what} was made on a processor of another model ({made.model}; this host's is {here}), and a guest keeps to what it saw of "
            "it: it can be loaded on a host of that model, or a new version can be built here"
        )
    if missing := lacking(made.features, features):
        raise Refused(
            f"{what} was made on a processor with features that this one has not (CPUID {', '.join(missing)}): "
            f"it can be loaded on a host that has them"
        )
