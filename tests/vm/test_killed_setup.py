"""Each step of the set-up is ended in its middle with kill -9, and the next run makes up for it (vmm/making.py in tests/unit/test_making.py)."""

from __future__ import annotations

import gzip
import os
import pwd
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from service import BIN, REPO, until

from vmm import assets, kernel, syscalls

pytestmark = [pytest.mark.service, pytest.mark.long]
HOME = os.environ | {"HOME": pwd.getpwuid(os.getuid()).pw_dir}  # where pip's settings may be
SAID = (
    "fetching the guest's kernel",
    "compiling the guest's init",
    "the guest's initramfs",
    "the kernel's modules",
    "the hypervisors' root",
    "the base image",
    "the builder's root",
)


def processes(word: str) -> list[str]:
    """Those whose command line names it."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [line.parent.name] if os.fsencode(word) in line.read_bytes() else []
        except OSError:
            continue
    return found


def test_assets(tmp_path: Path, host_before: dict[str, set[str]]) -> None:
    cache = tmp_path / "cache"
    environment = os.environ | {"TORPOR_CACHE": str(cache)}
    for number, said in enumerate(SAID):
        with subprocess.Popen([BIN / "torpor", "assets"], stderr=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stderr is not None
            assert any(said in line for line in process.stderr), said
            until(lambda: list(cache.glob(".new-*/*")) or process.poll() is not None, 60)
            process.kill()
        until(lambda: not processes(str(cache)), 20)
        whole = min(number, len(SAID) - 2)  # the last two are made beside each other, and both may have been ended
        assert list(assets.missing(cache).values())[:whole] == [False] * whole, "a step that was whole is made again"
    subprocess.run([BIN / "torpor", "assets"], check=True, env=environment, timeout=300)
    assert not any(assets.missing(cache).values())
    made = {"kernel", "guest", "initrd", "modules", "qemu-root", "base.tar", "builder", (cache / "qemu-root").readlink().name}
    remembered = {"kernel.available", "qemu-root.digest"}
    assert {path.name for path in cache.iterdir()} == made | {f"{name}.key" for name in made} | remembered | {"lock"}
    assert not [point for point in syscalls.mount_points() if point.startswith(str(cache))]
    modules = kernel.module_files(cache / "kernel", kernel.MODULES)
    packed = gzip.decompress((cache / "initrd").read_bytes())
    assert all(f"m/{path.name}\0".encode() in packed for path in modules) and (cache / "guest/init").read_bytes() in packed
    with tarfile.open(cache / "base.tar") as archive:
        assert {"./usr/bin/dnf", "./usr/bin/apt"} <= set(archive.getnames())
    shown = subprocess.run(["chroot", cache / "builder", "/usr/sbin/dockerd", "--version"], capture_output=True, text=True, check=True)
    assert "version 26" in shown.stdout
    said = subprocess.run(
        ["chroot", cache / "qemu-root", "/usr/bin/qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True
    )
    assert "QEMU emulator" in said.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, host_before: dict[str, set[str]]) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("clone") / "torpor"
    subprocess.run(["git", "clone", "-q", REPO, directory], check=True)
    yield directory
    subprocess.run(["rm", "-rf", directory], check=True)


def killed(clone: Path, target: str, is_under_way: Callable[[], object]) -> None:
    with subprocess.Popen(["make", target], cwd=clone, env=HOME, start_new_session=True) as process:
        until(lambda: is_under_way() or process.poll() is not None, 300, 0.005)
        assert process.poll() is None, f"make {target} was over before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)


def test_the_virtual_environment(clone: Path) -> None:
    installed = clone / ".venv/lib/python3.11/site-packages"
    killed(clone, "deps", lambda: len(list(installed.glob("*.dist-info"))) > 10)
    assert not (clone / ".venv/ready").exists()
    subprocess.run(["make", "deps"], cwd=clone, env=HOME, check=True, timeout=500)
    names = [
        line.partition("==")[0].lower().replace("-", "_") for line in (clone / "requirements.lock").read_text().splitlines() if "==" in line
    ]
    there = {
        path.name.rpartition(".")[0].rpartition("-")[0].lower().replace("-", "_").replace(".", "_")
        for path in installed.glob("*.dist-info")
    }
    assert not [name for name in names if name.replace(".", "_") not in there]
    made = (clone / ".venv/ready").stat().st_mtime_ns
    subprocess.run(["make", "deps"], cwd=clone, env=HOME, check=True, timeout=60)
    assert (clone / ".venv/ready").stat().st_mtime_ns == made, "a virtual environment that was whole is made again"


def test_the_compiled_edge(clone: Path) -> None:
    """After the one above, which made what it needs."""
    library = clone / ".venv/lib"
    killed(clone, "compiled", lambda: list(library.glob("torpor-edge-*/objects/**/*.o")))
    show = [clone / ".venv/bin/python", "-c", "from gateway.edge.client import http1; print(http1.__file__)"]
    assert subprocess.run(show, cwd=clone, check=True, capture_output=True, text=True).stdout.endswith(".py\n")
    until(lambda: not processes(str(library)), 60)
    subprocess.run(["make", "compiled"], cwd=clone, env=HOME, check=True, timeout=500)
    assert subprocess.run(show, cwd=clone, check=True, capture_output=True, text=True).stdout.endswith(".so\n")
    assert len(list(library.glob("torpor-edge-*"))) == 1, "what the killed one left is still there"
