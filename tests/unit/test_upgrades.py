"""What doctor says of images and sleepers that an update of the host left behind, and what a start does about them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from gateway.config import Settings
from gateway.messages import AGENT_PROTOCOL, Shape
from vmm import diffs, making, manifest, sealing, upgrades
from vmm.errors import Refused
from vmm.manifest import Manifest
from vmm.provenance import Provenance
from vmm.qemu import roots

SHAPE = Shape(memory_mib=1, vcpus=1, disk_bytes=1, accelerator="tcg", baseline_mib=1)
MANIFEST_OF_165A0CB = (
    b'{"shape":{"memory_mib":2048,"vcpus":1,"disk_bytes":8589934592,"accelerator":"tcg","baseline_mib":512},'
    b'"memory_bytes":125829120,"boot_bytes":1048576,"hypervisor":"qemu"}'
)


def root(cache: Path, name: str, version: str) -> None:
    (cache / name).mkdir()
    (cache / name / "torpor.json").write_bytes(msgspec.json.encode({"version": version, "machine": "pc-q35-7.2"}))
    making.key_path(cache / name).write_text("made")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A host whose QEMU is of version 7.2.22, with the root of 7.2.21 still there."""
    cache = tmp_path / "cache"
    for directory in ("cache/kernel", "cache/guest", "root/images", "root/sessions"):
        (tmp_path / directory).mkdir(parents=True)
    (cache / "kernel/release").write_text("6.1.0-56")
    (cache / "kernel/version").write_text("6.1.192-2")
    (cache / "guest/init").write_bytes(b"init")
    (cache / "guest/protocol").write_text(str(AGENT_PROTOCOL))
    root(cache, "qemu-root-a", "7.2.21")
    root(cache, "qemu-root-b", "7.2.22")
    (cache / "qemu-root").symlink_to("qemu-root-b")
    return Settings(cache=cache, root=tmp_path / "root")


def image(settings: Settings, key: str, **changed: object) -> None:
    now = upgrades.new(settings)
    made = Provenance("qemu", now.version, "pc-q35-7.2", "qemu-root-b", kernel=now.kernel, agent=now.agent, protocol=AGENT_PROTOCOL)
    (settings.images_dir / key).mkdir()
    manifest.write(settings.images_dir / key, Manifest(SHAPE, 1, 1, "qemu", msgspec.structs.replace(made, **changed)))


def test_what_is_as_new_as_the_host_has_no_line(settings: Settings) -> None:
    image(settings, "one")
    assert upgrades.report(settings, {}, {"vm-1": "one"}) == [
        (
            "new images",
            True,
            f"QEMU 7.2.22, pc-q35-7.2; kernel 6.1.0-56 6.1.192-2; agent {upgrades.new(settings).agent}, protocol {AGENT_PROTOCOL}",
        )
    ]
    assert not upgrades.old_images(settings)


def test_images_and_sleepers_on_an_older_hypervisor_are_named_with_the_reason(settings: Settings) -> None:
    for key in ("one", "two"):
        image(settings, key, version="7.2.21", root="qemu-root-a")
    image(settings, "new")
    _, line = upgrades.report(settings, {"one": "flask 1.0", "two": "flask 2.0"}, {"vm-1": "one", "vm-2": "new"})
    assert line[:2] == ("old hypervisor", True)
    assert line[2].startswith(f"images flask 1.0, flask 2.0; sleepers vm-1: QEMU 7.2.21 in {settings.cache}/qemu-root-a stays for them")
    assert upgrades.old_images(settings) == dict.fromkeys(("one", "two"), "made by QEMU 7.2.21, and the host has 7.2.22")


def test_what_nothing_here_can_load_is_a_fault_that_names_what_could(settings: Settings) -> None:
    image(settings, "one", version="7.2.20", root="qemu-root-z")
    image(settings, "two", protocol=AGENT_PROTOCOL + 1)
    lines = [line for line in upgrades.report(settings, {}, {"vm-1": "one"}) if not line[1]]
    assert "sleepers vm-1: each was made by QEMU 7.2.20 (pc-q35-7.2)" in lines[0][2] and "there is 7.2.21, 7.2.22" in lines[0][2]
    assert f"speaks protocol {AGENT_PROTOCOL + 1}" in lines[1][2]


def test_an_older_kernel_and_an_older_agent_are_said(settings: Settings) -> None:
    image(settings, "one", kernel="6.1.0-50 6.1.170-1", agent="abc", protocol=1)
    lines = {check: text for check, _, text in upgrades.report(settings, {}, {})}
    assert "they run kernel 6.1.0-50 6.1.170-1" in lines["old kernel"] and "agent abc, protocol 1" in lines["old agent"]
    assert "and new ones get 6.1.0-56 6.1.192-2" in upgrades.old_images(settings)["one"]


def test_an_image_of_commit_165a0cb_is_given_what_made_it(settings: Settings) -> None:
    (settings.images_dir / "old").mkdir()
    (settings.images_dir / "old" / manifest.MANIFEST).write_bytes(MANIFEST_OF_165A0CB)
    sealing._seal_image(settings.images_dir / "old")
    assert manifest.read(settings.images_dir / "old", "qemu").made == Provenance()
    (settings.cache / "qemu-root.first").write_text("qemu-root-a")
    upgrades.tidy(settings, print)
    made = manifest.read(settings.images_dir / "old", "qemu").made
    assert (made.version, made.machine, made.root, made.protocol) == ("7.2.21", "pc-q35-7.2", "qemu-root-a", 1)


def test_a_start_keeps_the_roots_of_images_and_of_sleepers_and_removes_the_others(settings: Settings) -> None:
    root(settings.cache, "qemu-root-c", "7.2.20")
    root(settings.cache, "qemu-root-d", "7.2.19")
    image(settings, "one", version="7.2.21", root="qemu-root-a")
    snapshot = settings.sessions_dir / "vm-1/snapshot-3"
    snapshot.mkdir(parents=True)
    diffs.write_manifest(snapshot, diffs.Manifest([3], [], 0, Provenance(version="7.2.20", root="qemu-root-c"), "vm-1"))
    said: list[str] = []
    upgrades.tidy(settings, said.append)
    assert [one.name for one in roots.Roots(settings.cache).all()] == ["qemu-root-a", "qemu-root-b", "qemu-root-c"]
    assert len(said) == 1 and "qemu-root-d is removed" in said[0]


def test_an_image_whose_agent_is_newer_than_this_torpor_is_left_alone(settings: Settings) -> None:
    image(settings, "one", protocol=AGENT_PROTOCOL + 1)
    with pytest.raises(Refused, match=f"image one speaks protocol {AGENT_PROTOCOL + 1}, .*: start the newer version again"):
        manifest.read(settings.images_dir / "one", "qemu")
