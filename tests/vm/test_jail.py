"""Isolation: what a Dockerfile could reach as plain root it must not reach here; and what a hypervisor is allowed."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service import Instance, until

from gateway.config import Settings
from vmm import jail
from vmm.build_network import BuildNetwork
from vmm.errors import VmmError
from vmm.namespaces import destroy_namespace, make_namespace
from vmm.qemu import machine as topology
from vmm.qemu.process import child_of
from vmm.syscalls import data_segments

pytestmark = pytest.mark.vm
FROM = "FROM public.ecr.aws/lambda/microvms:al2023-minimal"
SECRET = Path("/root/torpor-secret-of-the-host")


@pytest.fixture(autouse=True)
def secret() -> Any:
    SECRET.write_text("host-secret-6f1d")
    yield
    SECRET.unlink()


def built(instance: Instance, name: str, files: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The build and its log."""
    arn = instance.create(name, instance.upload(files, f"{name}.zip"))
    build = instance.built(arn)
    events = instance.client("logs").get_log_events(
        logGroupName=f"/aws/lambda-microvms/{name}", logStreamName=f"build/1.0/{build['buildId']}", startFromHead=True
    )["events"]
    instance.client().delete_microvm_image(imageIdentifier=arn)
    until(lambda: arn not in [item["imageArn"] for item in instance.client().list_microvm_images()["items"]])
    return build, "\n".join(event["message"] for event in events)


# Each RUN may fail; what it prints is looked at.
ESCAPES = {
    "mount-from-link": f"{FROM} AS evil\nRUN ln -s / /out\n{FROM}\nRUN --mount=type=bind,from=evil,source=/out,target=/mnt ls -R /mnt/root; cat /mnt/root/torpor-secret-of-the-host",
    "mount-cache-id": f"{FROM}\nRUN --mount=type=cache,id=../../../../../../../../root,target=/mnt ls -la /mnt; cat /mnt/torpor-secret-of-the-host",
    "look-around": f"""{FROM}
RUN cat /proc/1/root/root/torpor-secret-of-the-host; cat /proc/*/root/root/torpor-secret-of-the-host; cat /var/lib/docker/../../root/torpor-secret-of-the-host; ls /old /out /var/lib/docker || true
RUN head -c1 /dev/kvm; head -c1 /dev/loop0; mknod /tmp/vda b 254 0 && head -c1 /tmp/vda && echo REACHED-A-DEVICE || true
RUN kill -0 1 2>/dev/null; for p in $(ls /proc | grep '^[0-9]'); do tr '\\\\0' ' ' </proc/$p/cmdline; done; mount -t proc proc /mnt 2>&1; ls /mnt || true
RUN echo looked-around""",
}  # fmt: skip


def printed(log: str) -> str:
    """What steps wrote, without the Dockerfile's own lines."""
    return "\n".join(line for line in log.splitlines() if re.match(r"#\d+ \d+\.\d+ ", line))


@pytest.mark.parametrize("name", ESCAPES)
def test_dockerfile_cannot_reach_the_host(instance: Instance, name: str) -> None:
    _, log = built(instance, f"escape-{name}", {"Dockerfile": ESCAPES[name] + "\n"})
    shown = printed(log)
    assert "host-secret-6f1d" not in shown and "REACHED-A-DEVICE" not in shown
    assert not [line for line in shown.splitlines() if line.strip().endswith("torpor-secret-of-the-host")]  # in no listing
    assert "torpor serve" not in shown and "gateway.control" not in shown
    assert name != "look-around" or "looked-around" in shown


def test_build_reaches_mirrors_but_no_service_of_the_host(instance: Instance) -> None:
    """The API listens on the host's loopback; 10.0.2.2 is the host as slirp shows it. dnf proves the way to the mirrors."""
    port = instance.environment["TORPOR_API__PORT"]
    program = (
        "import socket\\n"
        f"for host, port in (('127.0.0.1', {port}), ('10.0.2.2', {port}), ('169.254.169.254', 80), ('10.255.255.53', 53)):\\n"
        "    try:\\n        socket.create_connection((host, port), 2); print('REACHED', host)\\n"
        "    except OSError as error:\\n        print('closed', host, error)\\n"
    )
    dockerfile = f'{FROM}\nRUN dnf install -y python3 && dnf clean all\nRUN printf "{program}" > /p.py && python3 /p.py\n'
    _, log = built(instance, "reach", {"Dockerfile": dockerfile})
    assert "closed 127.0.0.1" in printed(log) and "REACHED" not in printed(log)


def holds(file: Path, needles: list[bytes]) -> list[bytes]:
    """Which of these are in a sparse file."""
    found, longest = set(), max(map(len, needles))
    with file.open("rb") as data:
        for start, end in data_segments(data.fileno()):
            tail = b""
            for at in range(start, end, 16 << 20):
                piece = tail + os.pread(data.fileno(), min(16 << 20, end - at), at)
                found |= {needle for needle in needles if needle in piece}
                tail = piece[-longest:]
    return sorted(found)


async def test_a_build_whose_network_does_not_start_says_why(tmp_path: Path) -> None:
    network = BuildNetwork(tmp_path / "none", tmp_path / "said")
    with pytest.raises(VmmError, match=r"has no network: .*No such file or directory"):
        await network.start()
    network.close()
    assert network.child is not None
    await network.child.wait()


def test_nothing_lent_to_a_build_stays_in_its_disk(instance: Instance, app: str) -> None:
    """Mirrors' names, proxies, certificates and pip's settings are in no file, name or variable of the image."""
    settings = instance.root / "builds/settings"
    words = set(
        re.findall(r"https?://[^\s\"']+", (settings / "apt/host.sources").read_text() + (settings / "xdg/pip/pip.conf").read_text())
    )
    hosts = {re.sub(r"https?://([^/:]+).*", r"\1", word) for word in words}
    vm = instance.launch(app)
    image = instance.root / "images" / instance.hypervisors()[vm["microvmId"]]["image"]
    instance.terminate(vm["microvmId"])
    dump = subprocess.run(["debugfs", "-R", "ls -p /dev/.lent", str(image / "disk.raw")], capture_output=True, text=True, check=False)
    assert "File not found" in dump.stderr
    for path in ("/etc/apt/sources.list.d/host.sources", "/etc/pip.conf", "/root/.config/pip/pip.conf", "/etc/apt/apt.conf.d/99mmdebstrap"):
        shown = subprocess.run(["debugfs", "-R", f"stat {path}", str(image / "disk.raw")], capture_output=True, text=True, check=False)
        assert "File not found" in shown.stderr, path
    # A public mirror's name also stands in what packages say of themselves, so finding it would prove nothing.
    told = [host for host in hosts if subprocess.run(["grep", "-rqF", host, "/usr/share/doc", "/usr/lib/python3"], check=False).returncode]
    needles = [f"{host}/".encode() for host in told] + [b"/dev/.lent"]
    for file in ("disk.raw", "boot.qcow2", "memory.raw"):
        assert not holds(image / file, needles), file
        assert holds(image / file, [b"\0" * 64]), file  # the search itself works


def test_hypervisor_runs_as_a_nobody_of_its_own(instance: Instance, app: str) -> None:
    vms = [instance.launch(app) for _ in range(2)]
    users = set()
    for vm in vms:
        record = instance.hypervisors()[vm["microvmId"]]
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{record['pid']}/status").read_text().splitlines() if ":\t" in line)
        users.add(status["Uid"])
        assert len(set(status["Uid"].split())) == 1 and int(status["Uid"].split()[0]) >= instance.first_uid
        assert status["CapEff"] == status["CapBnd"] == status["CapPrm"] == "0000000000000000"
        assert status["NoNewPrivs"].strip() == "1" and status["Seccomp"].strip() == "2"
        root = subprocess.run(["ls", f"/proc/{record['pid']}/root/"], capture_output=True, text=True, check=True).stdout.split()
        assert "root" not in root and "var" not in root and "work" not in root
        for group in ("memory", "pids"):
            joined = Path(f"/proc/{record['pid']}/cgroup").read_text()
            assert re.search(rf"torpor-{instance.name}(-microvms\.scope)?/{record['vm']}\n", joined), group
            parent = int(Path(f"/proc/{record['pid']}/stat").read_text().rpartition(")")[2].split()[1])
            assert Path(f"/proc/{parent}/cgroup").read_text() == joined, "its unshare(1) too: with that it would end"
        assert not Path(f"/proc/{record['pid']}/net/dev").read_text().count("tap0")
    assert len(users) == 2
    instance.terminate(*(vm["microvmId"] for vm in vms))


@pytest.mark.parametrize("has_kvm", [True, False])
def test_a_hypervisor_has_kvm_and_no_other_device(has_kvm: bool) -> None:
    """Whatever mode and owner the host's has: the node is the jail's own, and nobody else may open it."""
    uid = 700_000 + 3 * 65_536 - 1
    idle = [topology.BINARY, "-M", "none", "-S", "-nodefaults", "-nographic"]
    process = subprocess.Popen(jail.command(Settings().cache / "qemu-root", [], uid, has_kvm, idle), stdin=subprocess.DEVNULL)
    try:
        pid = until(lambda: child_of(process.pid))
        until(lambda: os.readlink(f"/proc/{pid}/exe") == topology.BINARY)
        dev = Path(f"/proc/{pid}/root/dev")
        assert sorted(path.name for path in dev.iterdir() if path.stat().st_rdev) == (["kvm", "null"] if has_kvm else ["null"])
        if has_kvm:
            node = (dev / "kvm").stat()
            assert stat.S_ISCHR(node.st_mode) and node.st_rdev == os.makedev(10, 232)
            assert (node.st_uid, node.st_gid, stat.S_IMODE(node.st_mode)) == (uid, uid, 0o600)
            mounted = next(line for line in Path(f"/proc/{pid}/mounts").read_text().splitlines() if line.split()[1] == "/dev").split()[3]
            assert {"ro", "nosuid", "noexec"} <= set(mounted.split(","))
            assert dev.stat().st_uid == 0
    finally:
        process.kill()
        process.wait()


def test_unprivileged_processes_are_unprivileged(instance: Instance) -> None:
    for name, user in (("edge-0", 0), ("edge-1", 0), ("control", 1)):
        status = Path(f"/proc/{instance.pid_of(name)}/status").read_text()
        assert f"Uid:\t{instance.first_uid + user}\t" in status
        assert "CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status


def test_only_the_guests_services_listen_in_its_network(instance: Instance, app: str) -> None:
    """Metadata and names; the way out is in tests/vm/test_guest_services.py."""
    vm = instance.launch(app)
    link = instance.run / instance.name / "netns" / instance.hypervisors()[vm["microvmId"]]["link"]
    listening = subprocess.run(["nsenter", f"--net={link}", "ss", "-ltunH"], capture_output=True, text=True, check=True).stdout
    assert sorted(line.split()[4] for line in listening.splitlines()) == ["169.254.169.254:80", "169.254.77.1:53", "169.254.77.1:53"]
    instance.terminate(vm["microvmId"])


@pytest.fixture
def shared_mount(tmp_path: Path) -> Iterator[Path]:
    """A network namespace pinned below a shared mount, as ip-netns(8) keeps its own in /run/netns (mount_namespaces(7))."""
    subprocess.run(["mount", "--bind", tmp_path, tmp_path], check=True)
    subprocess.run(["mount", "--make-shared", tmp_path], check=True)
    try:
        make_namespace(tmp_path / "namespace", lambda: None)
        yield tmp_path / "namespace"
        destroy_namespace(tmp_path / "namespace")
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_the_hosts_mounts_are_left_alone(instance: Instance, app: str, shared_mount: Path) -> None:
    """What runs in our jails must not detach what is mounted on the host: a detach in a copy of a shared mount reaches the original."""
    build, _ = built(instance, "mounts", {"Dockerfile": f"{FROM}\nRUN false\n"})  # its network and its jail came up all the same
    assert build["buildState"] == "FAILED"
    instance.terminate(instance.launch(app)["microvmId"])
    assert str(shared_mount) in Path("/proc/mounts").read_text()
