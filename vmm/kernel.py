"""The guest's kernel and initramfs: Debian's cloud kernel, fetched by apt, and an archive with init and its modules."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import making

# In the order in which they load; dependencies are resolved by modprobe.
MODULES = (
    *("virtio_pci", "virtio_net", "virtio_blk", "virtio_console"),
    *("crc32c-intel", "libcrc32c", "nfnetlink", "nf_tables", "tcp_diag"),
)
# Firecracker's machine: virtio over MMIO, announced by ACPI; the agent's channel is a vsock; randomness comes from the host.
FIRECRACKER_MODULES = (
    *("virtio_mmio", "virtio_net", "virtio_blk", "vmw_vsock_virtio_transport", "virtio_rng"),
    *MODULES[MODULES.index("crc32c-intel") :],
)
# What images with all capabilities have in /lib/modules: these, and what these need. Left out are drivers of hardware that no guest has.
EXTRA_MODULES = (
    *("kernel/arch/x86/crypto/", "kernel/block/", "kernel/crypto/", "kernel/fs/", "kernel/lib/", "kernel/mm/", "kernel/net/"),
    *(f"kernel/drivers/{name}/" for name in ("block", "md", "target", "vhost", "nvme/host", "nvme/target", "net/wireguard")),
    *(f"kernel/drivers/net/{name}.ko" for name in ("bareudp", "dummy", "geneve", "gtp", "ifb", "macsec", "macvlan", "macvtap")),
    *(f"kernel/drivers/net/{name}.ko" for name in ("netconsole", "nlmon", "tap", "tun", "veth", "vrf", "vsockmon")),
    *("kernel/drivers/net/bonding/", "kernel/drivers/net/ipvlan/", "kernel/drivers/net/team/", "kernel/drivers/net/vxlan/"),
    *("kernel/drivers/scsi/iscsi_tcp.ko", "kernel/drivers/scsi/sd_mod.ko", "kernel/drivers/scsi/sr_mod.ko", "kernel/drivers/cdrom/"),
)
# What it is told: nothing that looks at clocks, tasks or pressure every so often, which each clone would do, and translate, in its first
# seconds, and one security module, for each is asked at every file and packet (kernel: Documentation/admin-guide/kernel-parameters.txt).
# A systemd in the image would wait 90 s for the console's device, to log people in there (systemd-getty-generator(8)).
WORDS = (
    "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off random.trust_cpu=on tsc=reliable nowatchdog psi=0 lsm=landlock "
    "systemd.getty_auto=no"
)
# A guest that only shows whether guests run: what follows "--" is init's, which says PROBED and ends (vmm/guest/init.c).
PROBE_WORDS = "-- probe"
PROBED = b"a guest's init runs"
PROBE_MIB = 256
# How a kernel is packed: magic number, and what unpacks it (kernel: scripts/extract-vmlinux).
_UNPACKERS = {b"\x02\x21\x4c\x18": "lz4", b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_DIGITS = 16  # of an agent's digest
_LISTS = "/var/lib/apt/lists"
_INSIDE = Path(__file__).parent / "inside/inside.c"
_COMPILE_SECONDS = 60
_GUEST = Path(__file__).parent / "guest"
_PACKAGE_DEADLINE_SECONDS = 300
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class AssetError(Exception):
    """Something that is made once per host could not be made; the text says what to do."""


def _run(*command: str, cwd: Path | None = None, deadline: float = 120) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=deadline)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError) as error:
        words = getattr(error, "stderr", None) or str(error)
        raise AssetError(f"{' '.join(command[:4])}: {str(words).strip()[-400:]}") from error
    return done.stdout


def meta_package() -> str:
    """Debian's meta-package of a kernel for virtual machines."""
    return f"linux-image-cloud-{_ARCHITECTURES[os.uname().machine]}"


def available(cache: Path) -> str:
    """Returns the version of the kernel that apt would fetch; empty where apt knows none, its lists removed for one. It is asked again when
    its lists are others: that takes a second."""
    try:
        lists = sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(_LISTS))
    except OSError:
        lists = []
    with contextlib.suppress(AssetError):
        return making.remembered(cache / "kernel.available", making.key_of(lists, meta_package()), _ask_apt) if lists else ""
    return ""


def _ask_apt() -> str:
    candidate = re.search(r"Candidate: (\S+)", _run("apt-cache", "policy", meta_package()))
    return candidate[1] if candidate and candidate[1] != "(none)" else ""


def kernel_package() -> str:
    """Returns the concrete kernel package behind the meta-package."""
    meta = meta_package()
    lines = _run("apt-cache", "depends", meta).splitlines()
    names = [line.split("Depends:")[1].strip() for line in lines if "Depends: linux-image" in line]
    if not names:
        raise AssetError(f"apt knows no {meta}: run apt-get update")
    return names[0]


def fetch_kernel(work: Path) -> None:
    """Unpacks the kernel package into `work`, a new directory (vmlinuz, modules, release, version)."""
    work.mkdir()
    _run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", kernel_package(), cwd=work, deadline=_PACKAGE_DEADLINE_SECONDS)
    package = next(work.glob("*.deb"))
    (work / "version").write_text(_run("dpkg-deb", "-f", str(package), "Version").strip(), encoding="ascii")
    _run("dpkg-deb", "-x", str(package), str(work))
    package.unlink()
    kernel = next((work / "boot").glob("vmlinuz-*"))
    release = kernel.name.removeprefix("vmlinuz-")
    kernel.rename(work / "vmlinuz")
    (work / "release").write_text(release, encoding="ascii")
    _run("depmod", "-b", str(work), release)


def module_files(kernel: Path, modules: Sequence[str]) -> list[Path]:
    """The modules to load, dependencies first."""
    release = (kernel / "release").read_text(encoding="ascii")
    files: list[Path] = []
    for module in modules:
        listing = _run("modprobe", "-d", str(kernel), "-S", release, "--show-depends", module)
        for line in listing.splitlines():
            words = line.split()
            if words[:1] == ["insmod"] and Path(words[1]) not in files:
                files.append(Path(words[1]))
    return files


def needed(listing: str, wanted: Sequence[str]) -> list[str]:
    """The files that begin with one of `wanted` and all that they need, of modules.dep(5), where each line has all of a module's."""
    files: set[str] = set()
    for line in listing.splitlines():
        file, _, needs = line.partition(":")
        if file.startswith(tuple(wanted)):
            files.update((file, *needs.split()))
    return sorted(files)


def make_modules(kernel: Path, target: Path, wanted: Sequence[str] = EXTRA_MODULES) -> None:
    """Makes /lib/modules for images in which modules load on demand (vmm/guest/modules.c): a directory of one kernel's."""
    release = (kernel / "release").read_text(encoding="ascii")
    whole, part = kernel / "lib/modules" / release, target / "lib/modules" / release
    for file in needed((whole / "modules.dep").read_text(encoding="ascii"), wanted):
        (part / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(whole / file, part / file)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copyfile(whole / name, part / name)
    _run("depmod", "-b", str(target), release)


def extract_elf(packed: Path, target: Path) -> None:
    """Returns the ELF file inside a bzImage, which is what Firecracker boots (kernel: Documentation/arch/x86/boot.rst, payload_offset)."""
    image = packed.read_bytes()
    if image[0x202:0x206] != b"HdrS":
        raise AssetError(f"{packed} is no bzImage")
    offset, length = struct.unpack_from("<2I", image, 0x248)
    start = (image[0x1F1] + 1) * 512 + offset
    payload = image[start : start + length]
    program = next((program for magic, program in _UNPACKERS.items() if payload.startswith(magic)), None)
    if program is None:
        raise AssetError(f"{packed} is packed in a way that is not known: {payload[:4].hex()}")
    try:
        # The kernel's build appends the unpacked size to what is packed.
        unpacked = subprocess.run([program, "-dc"], input=payload[:-4], check=True, capture_output=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise AssetError(f"{packed} could not be unpacked: {error}; apt-get install {program}") from error
    if not unpacked.startswith(b"\x7fELF"):
        raise AssetError(f"{packed} holds no ELF file")
    target.write_bytes(unpacked)


def cpio(entries: list[tuple[str, int, bytes]]) -> bytes:
    """A newc archive (kernel: Documentation/driver-api/early-userspace/buffer-format.rst)."""
    out = bytearray()
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


def make_initrd(kernel: Path, init: Path, target: Path, modules: Sequence[str] = MODULES) -> None:
    """Writes the initramfs: /init, the modules, and the list that /init reads."""
    files = module_files(kernel, modules)
    entries: list[tuple[str, int, bytes]] = [("dev", 0o040755, b""), ("init", 0o100755, init.read_bytes()), ("m", 0o040755, b"")]
    entries += [(f"m/{file.name}", 0o100644, file.read_bytes()) for file in files]
    entries.append(("modules.list", 0o100644, "".join(f"/m/{file.name}\n" for file in files).encode()))
    target.write_bytes(gzip.compress(cpio(entries), 1))


def make_inside(target: Path) -> None:
    """Compiles the program that tries walls from inside a microVM. Raises OSError."""
    flags = ("-std=gnu11", "-Os", "-static", "-s", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-idirafter", "/usr/include")
    machine = ("-idirafter", f"/usr/include/{os.uname().machine}-linux-gnu")
    done = subprocess.run(
        ["musl-gcc", *flags, *machine, "-o", str(target), str(_INSIDE)],
        capture_output=True,
        text=True,
        timeout=_COMPILE_SECONDS,
        check=False,
    )
    if done.returncode:
        raise OSError(done.stderr.strip()[-300:] or "musl-gcc failed")


def described(kernel: Path) -> str:
    """Returns a fetched kernel's release, and its package's version. Raises OSError."""
    files = [kernel / name for name in ("release", "version")]  # commit 165a0cb fetched kernels without a version
    return " ".join(file.read_text(encoding="ascii").strip() for file in files if file.exists())


def guest(cache: Path) -> tuple[str, str, int]:
    """Returns which kernel boots now, which agent, and what protocol that speaks. Raises OSError."""
    init = (cache / "guest/init").read_bytes()
    protocol = (cache / "guest/protocol").read_text(encoding="ascii")
    return described(cache / "kernel"), hashlib.sha256(init).hexdigest()[:_DIGITS], int(protocol)


def init_sources() -> list[Path]:
    return sorted(path for path in _GUEST.iterdir() if path.suffix in (".c", ".h") or path.name == "Makefile")


def make_init(target: Path, sources: Path = _GUEST) -> None:
    """Compiles the guest's init into the directory `target`, and writes down which protocol its agent speaks (commit 165a0cb's: 1)."""
    _run("make", "-s", "-C", str(sources), f"OUT={target}")
    headers = "".join(path.read_text(encoding="utf-8") for path in sorted(sources.glob("*.h")))
    number = re.search(r"#define AGENT_PROTOCOL (\d+)", headers)
    (target / "protocol").write_text(number[1] if number else "1", encoding="ascii")
