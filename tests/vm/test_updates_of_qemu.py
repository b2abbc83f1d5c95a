"""An update of the host's QEMU, kernel or agent loses no sleeper.

The other QEMU is the host's own program with another last digit in the version that it says, and so another root: devices and states are
the same, so this shows which root is chosen, kept, missed and found again, and not that QEMU's versions load each other's states, which
nothing here relies on. The older agent is compiled from the sources of commit 165a0cb (tests/guests/protocol-1.tar.gz) and speaks
protocol 1; what that commit wrote beside the states is written again in its format: it knew nothing of what made them.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest
import xxhash
from service import REPO, Instance, until
from wire import get

from gateway.config import Settings
from gateway.messages import AGENT_PROTOCOL
from vmm import digests, kernel, seals
from vmm.qemu.machine import BINARY

pytestmark = pytest.mark.vm
GUESTS = REPO / "tests/guests"
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
AS_QEMU = 'mount --bind "$0" "$1"; shift; exec "$@"'  # in a mount namespace of the service's own
ASSETS = ("guest", "initrd")


def version_of(qemu: Path) -> str:
    said = subprocess.run([qemu, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"version (.+)", said)
    assert found is not None
    return found[1]


def other_qemu(target: Path) -> str:
    """The host's, which says that it is of another version."""
    version = version_of(Path(BINARY))
    at = max(index for index, letter in enumerate(version) if letter.isdigit())
    other = f"{version[:at]}{(int(version[at]) + 1) % 10}{version[at + 1 :]}"
    target.write_bytes(Path(BINARY).read_bytes().replace(f"version {version}".encode(), f"version {other}".encode()))
    target.chmod(0o755)
    assert version_of(target) == other != version
    return other


@contextlib.contextmanager
def cache_of_its_own() -> Iterator[Path]:
    """A copy of the host's, by links, without what is of other instances: another QEMU's root may come into it."""
    host = Settings().cache
    place = Path(tempfile.mkdtemp(prefix="torpor-upgrade-", dir=host.parent))
    try:
        place.chmod(0o755)
        subprocess.run(["cp", "-al", f"{host}/.", place], check=True)
        for name in ("lock", "needed-roots"):
            shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink(missing_ok=True)
        yield place
    finally:
        shutil.rmtree(place)


@pytest.fixture
def cache() -> Iterator[Path]:
    """Its guest is of commit 165a0cb until `now_guest`."""
    with cache_of_its_own() as place:
        for name in ASSETS:
            (place / name).rename(place / f"now-{name}")
            digests.forget(place / name)
        with tempfile.TemporaryDirectory() as sources:
            with tarfile.open(GUESTS / "protocol-1.tar.gz") as archive:
                archive.extractall(sources)
            kernel.make_init(place / "guest", Path(sources))
        kernel.make_initrd(place / "kernel", place / "guest/init", place / "initrd")
        yield place


def now_guest(cache: Path) -> None:
    """As after an update of Torpor."""
    for name in ASSETS:
        shutil.rmtree(cache / name) if (cache / name).is_dir() else (cache / name).unlink()
        (cache / f"now-{name}").rename(cache / name)
        digests.forget(cache / name)  # as where it is made again


def started(one: Instance, qemu: Path | None = None) -> None:
    one.start(("unshare", "-m", "sh", "-c", AS_QEMU, str(qemu), BINARY) if qemu is not None else ())


def counted(one: Instance, vm: dict[str, Any]) -> str:
    answer = get(vm["endpoint"], one.root / "tls/ca.crt", one.token(vm["microvmId"]))
    assert answer.status == 200, answer
    return answer.body.decode()


def doctor(one: Instance) -> dict[str, tuple[bool, str]]:
    said = json.loads(one.command("torpor", "doctor", "--json", check=False).stdout)
    return {row["check"]: (row["ok"], row["text"]) for row in said}


def made(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())["manifest"]["made"])


def as_165a0cb_wrote_it(one: Instance, cache: Path, root: str) -> None:
    """Manifests say nothing of what made them or whose they are, and have no seals; files have plain checksums. The cache has one root."""
    (one.root / seals.FILE).unlink()
    for path in (*one.root.glob("images/*/manifest.json"), *one.root.glob("sessions/*/snapshot-*/snapshot.json")):
        manifest = json.loads(path.read_text())["manifest"]
        for name in ("made", "account", "image", "session"):
            manifest.pop(name, None)
        if "chain" in manifest:
            for file in manifest["files"]:
                file["digest"] = xxhash.xxh3_64_hexdigest((path.parent / file["name"]).read_bytes())
        else:
            del manifest["files"]
        path.write_text(json.dumps(manifest))
    for path in (*cache.glob("qemu-root.*"), *cache.glob("needed-roots/*")):
        path.unlink()
    (cache / "qemu-root").unlink()
    (cache / root).rename(cache / "qemu-root")
    for path in cache.glob("qemu-root-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (cache / "qemu-root/torpor.json").unlink()
    (cache / "qemu-root.key").write_text("of that commit")


@pytest.mark.parametrize("sleepers", [3, pytest.param(10, marks=pytest.mark.long)])
def test_sleepers_of_an_older_qemu_and_an_older_agent_wake(host_before: object, cache: Path, sleepers: int) -> None:
    one = Instance("testu", 700_000 + 8 * 262_144, CACHE=str(cache), STANDBYS__PER_IMAGE="1")
    one.environment["TORPOR_CACHE"] = str(cache)
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: one.process is not None and one.stop())
            story(one, cache, sleepers)
        assert "Traceback" not in one.log.read_text()
    finally:
        one.remove()


def story(one: Instance, cache: Path, sleepers: int) -> None:
    older = one.directory / "older-qemu"
    old, new = other_qemu(older), version_of(Path(BINARY))
    ledger = one.directory / "ledger"
    subprocess.run(["musl-gcc", "-static", "-Os", "-s", "-o", ledger, GUESTS / "ledger.c"], check=True)
    files = {
        "Dockerfile": "FROM public.ecr.aws/lambda/microvms:al2023-minimal\nCOPY --chmod=755 ledger /ledger.bin\nEXPOSE 8080\nCMD [\"/ledger.bin\"]\n",
        "ledger": ledger.read_bytes(),
    }  # fmt: skip

    # The host has the older QEMU and the older agent.
    started(one, older)
    arn = one.create("ledger", one.upload(files))
    assert one.built(arn)["buildState"] == "SUCCESSFUL"
    vms = [one.launch(arn, idlePolicy=POLICY) for _ in range(sleepers)]
    for vm in vms:
        assert counted(one, vm) == "1 1"
    for vm in vms:
        one.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
        one.state(vm["microvmId"], "SUSPENDED")
    one.stop()
    (image,) = one.root.glob("images/*/manifest.json")
    for path in (image, *one.root.glob("sessions/*/snapshot-1/snapshot.json")):
        wrote = made(path)
        assert (wrote["hypervisor"], wrote["version"], wrote["protocol"]) == ("qemu", old, 1)
        assert re.fullmatch(r"pc-q35-[0-9.]+", wrote["machine"]) and wrote["kernel"] and wrote["agent"]
    assert made(image)["features"]
    root = wrote["root"]

    # It is updated, and the older root is not there.
    now_guest(cache)
    (cache / root).rename(cache / "away")
    started(one)
    first = vms[0]["microvmId"]
    with contextlib.suppress(botocore.exceptions.ClientError):
        one.client().resume_microvm(microvmIdentifier=first)
    until(lambda: f"was made by QEMU {old}" in one.log.read_text(), 20)
    assert one.state(first, "SUSPENDED")["state"] == "SUSPENDED"
    with pytest.raises(botocore.exceptions.ClientError, match=f"was made by {re.escape(f'QEMU {old}')}"):
        one.client().resume_microvm(microvmIdentifier=first)
    well, why = doctor(one)["refused"]
    assert not well and f"was made by QEMU {old}" in why and root in why and "ledger 1.0" in why and first in why
    (cache / "away").rename(cache / root)

    # It is back: they wake, all that they counted with them.
    one.client().resume_microvm(microvmIdentifier=first)
    one.state(first, "RUNNING")
    awake = vms[: len(vms) - 1]
    for vm in awake:
        assert counted(one, vm) == "2 2"
    record = one.hypervisors()[first]
    assert (record["made"]["version"], record["made"]["root"], record["made"]["protocol"]) == (old, root, 1)
    said = doctor(one)
    assert (
        "refused" not in said
        and said["new images"][1].startswith(f"QEMU {new}, ")
        and f"protocol {AGENT_PROTOCOL}" in said["new images"][1]
    )
    assert said["old hypervisor"][0] and "images ledger 1.0; sleepers " + vms[-1]["microvmId"] in said["old hypervisor"][1]
    assert f"QEMU {old} in {cache / root}" in said["old hypervisor"][1] and "protocol 1" in said["old agent"][1]

    # What is built from now on is new, also of the same artifact.
    one.upload(files)
    one.command("torpor", "images", "--rebuild-old")
    fresh = one.launch(arn, idlePolicy=POLICY)
    assert counted(one, fresh) == "1 1"
    wrote = one.hypervisors()[fresh["microvmId"]]["made"]
    assert (wrote["version"], wrote["protocol"]) == (new, AGENT_PROTOCOL)
    assert "is built" not in one.command("torpor", "images", "--rebuild-old").stdout
    one.terminate(fresh["microvmId"])
    one.client().delete_microvm_image_version(imageIdentifier=arn, imageVersion="2.0")
    until(lambda: len(list(one.root.glob("images/*/manifest.json"))) == 1)
    one.stop()  # which puts all to sleep

    # The same, as commit 165a0cb left it: nothing says what made it, but that the root was there.
    as_165a0cb_wrote_it(one, cache, root)
    started(one)
    for vm in (vms[0], vms[-1]):
        assert counted(one, vm) == ("2 2" if vm is vms[-1] else "3 3")
    assert made(image)["version"] == old and made(image)["protocol"] == 1
    one.terminate(*(vm["microvmId"] for vm in vms))
