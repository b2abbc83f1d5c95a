"""Which modules a guest's init loads for what a kernel asks (vmm/guest/modules.c), with a loader that only says it: modules.dep(5),
modules.softdep(5). Loaded for good they are in the table of images (fidelity/rows/kernel.py)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.vm
GUEST = Path(__file__).parents[2] / "vmm/guest"
MAIN = """
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>
static int any_uname(struct utsname *machine) { strcpy(machine->release, "6.1"); return 0; }
static long say_it(int file)
{
    char path[64], name[4096] = "";
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    if (readlink(path, name, sizeof name - 1) < 0) return -1;
    puts(strrchr(name, '/') + 1);
    return 0;
}
#define uname any_uname
#define syscall(number, file, ...) say_it(file)
#include "modules.c"
void put(const char *path, const char *text) { (void)path; (void)text; }
int main(int count, char **asked) { return count == 2 && load(asked[1], 0) ? 1 : 0; }
"""
FILES = {
    "modules.dep": "kernel/net/torpor_bridge.ko: kernel/net/torpor_stp.ko kernel/net/torpor-llc.ko\nkernel/net/torpor_stp.ko: kernel/net/torpor-llc.ko\n"
    "kernel/net/torpor-llc.ko:\nkernel/fs/torpor_fs.ko: kernel/lib/torpor_sum.ko\nkernel/lib/torpor_sum.ko:\nkernel/lib/torpor_fast.ko:\n",
    "modules.alias": "alias fs-torpor torpor_fs\nalias rtnl-link-torpor torpor_bridge\nalias char-major-99-* torpor_fs\nalias sum torpor_fast\n",
    "modules.softdep": "softdep torpor_sum pre: sum absent post: torpor-llc\n",
    "modules.symbols": "alias symbol:torpor_call torpor_sum\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("modules")
    for name, text in FILES.items():
        (work / "root/6.1").mkdir(parents=True, exist_ok=True)
        (work / "root/6.1" / name).write_text(text)
    for line in FILES["modules.dep"].splitlines():
        module = work / "root/6.1" / line.partition(":")[0]
        module.parent.mkdir(parents=True, exist_ok=True)
        module.touch()
    (work / "main.c").write_text(MAIN)
    headers = ["-idirafter", "/usr/include", f'-DROOT="{work}/root"', f"-I{GUEST}"]
    subprocess.run(["musl-gcc", "-std=gnu11", "-static", *headers, "-o", work / "loader", work / "main.c"], check=True, timeout=60)
    return work / "loader"


@pytest.mark.parametrize(
    ("asked", "loaded", "code"),
    [
        ("torpor_stp", ["torpor-llc", "torpor_stp"], 0),
        ("torpor-llc", ["torpor-llc"], 0),  # dashes and underscores are one
        (
            "rtnl-link-torpor",
            ["torpor-llc", "torpor-llc", "torpor_stp", "torpor_bridge"],
            0,
        ),  # again where it cannot be seen that it is there
        ("fs-torpor", ["torpor_fast", "torpor_sum", "torpor-llc", "torpor_fs"], 0),  # what may be missing is no failure
        ("char-major-99-7", ["torpor_fast", "torpor_sum", "torpor-llc", "torpor_fs"], 0),
        ("symbol:torpor_call", ["torpor_fast", "torpor_sum", "torpor-llc"], 0),
        ("char-major-98-7", [], 1),
        ("../../../etc/passwd", [], 1),
    ],
)
def test_a_module_comes_behind_what_it_needs(loader: Path, asked: str, loaded: list[str], code: int) -> None:
    done = subprocess.run([loader, asked], check=False, capture_output=True, text=True, timeout=10)
    assert (done.stdout.split(), done.returncode) == ([f"{name}.ko" for name in loaded], code)
