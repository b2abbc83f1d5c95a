"""What a host has that tests could leave behind."""

from __future__ import annotations

from pathlib import Path

TEST_UIDS = range(700_000, 700_000 + 8 * 262_144)


def snapshot() -> dict[str, set[str]]:
    """Processes of test users, mounts, control groups, network namespaces, tap devices, files in shared places."""
    processes = set()
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue
        if fields["State"].startswith("Z"):  # over, and not ours to reap
            continue
        uid = int(fields["Uid"].split()[0])
        name = fields["Name"].strip()
        if uid in TEST_UIDS or name in ("qemu-system-x86", "slirp4netns", "buildah", "torpor"):
            processes.add(f"{status.parent.name} {name}")
    mounts = {line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()}
    return {
        "processes": processes,
        "mounts": mounts,
        "control groups": {str(path) for path in Path("/sys/fs/cgroup").glob("*/torpor-*")} | {str(p) for p in Path("/sys/fs/cgroup").glob("torpor-*")},
        "namespaces": {path.name for path in Path("/run/netns").glob("*")} if Path("/run/netns").exists() else set(),
        "taps": {path.name for path in Path("/sys/class/net").glob("*")},
        "files": {str(path) for place in ("/run", "/var/lib", "/etc") for path in Path(place).glob("torpor*")}
        | {str(path) for path in Path("/var/tmp").glob("torpor-*")} | {str(path) for path in Path("/tmp").glob("torpor*")},
    }  # fmt: skip


def left(before: dict[str, set[str]], after: dict[str, set[str]]) -> list[str]:
    return sorted(f"{kind}: {item}" for kind in before for item in after[kind] - before[kind])
