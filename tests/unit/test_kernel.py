"""Which of a kernel's modules come into images (vmm/kernel.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm import kernel

DEP = """\
kernel/net/bridge/bridge.ko: kernel/net/802/stp.ko kernel/net/llc/llc.ko
kernel/net/802/stp.ko: kernel/net/llc/llc.ko
kernel/net/llc/llc.ko:
kernel/fs/nfs/nfs.ko: kernel/drivers/infiniband/core/rdma_cm.ko
kernel/drivers/infiniband/core/rdma_cm.ko:
kernel/drivers/net/ethernet/intel/e1000/e1000.ko:
kernel/drivers/net/tun.ko:
"""


def test_what_a_module_needs_comes_with_it_wherever_it_lies() -> None:
    assert kernel.needed(DEP, ("kernel/fs/", "kernel/net/bridge/")) == [
        "kernel/drivers/infiniband/core/rdma_cm.ko", "kernel/fs/nfs/nfs.ko", "kernel/net/802/stp.ko", "kernel/net/bridge/bridge.ko",
        "kernel/net/llc/llc.ko",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "is_there"),
    [("kernel/drivers/net/tun.ko", True), ("kernel/net/llc/llc.ko", True), ("kernel/drivers/net/ethernet/intel/e1000/e1000.ko", False)],
)
def test_drivers_of_hardware_stay_out(module: str, is_there: bool) -> None:
    assert (module in kernel.needed(DEP, kernel.EXTRA_MODULES)) is is_there


def test_the_directory_is_one_that_modprobe_reads(tmp_path: Path) -> None:
    whole = tmp_path / "kernel/lib/modules/6.1"
    for line in DEP.splitlines():
        file = whole / line.partition(":")[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        (whole / name).touch()
    (whole / "modules.dep").write_text(DEP)
    (tmp_path / "kernel/release").write_text("6.1")
    kernel.make_modules(tmp_path / "kernel", tmp_path / "made", ("kernel/net/bridge/",))
    made = tmp_path / "made/lib/modules/6.1"
    assert sorted(file.name for file in made.rglob("*.ko")) == ["bridge.ko", "llc.ko", "stp.ko"]
    assert "kernel/net/bridge/bridge.ko:" in (made / "modules.dep").read_text() and (made / "modules.alias").exists()
