"""Supply: what an index gives in the place of a package of the lock is refused by its digest. No network: the index is a directory."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
OWN = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PIP_"))}


def wheel(directory: Path, body: str) -> Path:
    directory.mkdir()
    path, info = directory / "harmless-1.0-py3-none-any.whl", "harmless-1.0.dist-info"
    files = {
        "harmless.py": body,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: harmless\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    listed = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}"
        for name, text in files.items()
    ]
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "\n".join([*listed, f"{info}/RECORD,,", ""]))
    return path


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """With a virtual environment in which nothing of a lock is installed."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("pyproject.toml", "Makefile"):
        (clone / name).write_text((REPO / name).read_text())
    subprocess.run(["/usr/bin/python3", "-m", "venv", str(clone / ".venv")], check=True, timeout=60)
    return clone


def install(clone: Path, index: Path, lock: str) -> tuple[str, str]:
    """Returns what the set-up's step for the lock says, and what of the package is there then."""
    for left in clone.glob(".venv/lib/python*/site-packages/harmless*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    shutil.rmtree(clone / ".venv/lock", ignore_errors=True)
    (clone / "requirements.lock").write_text(lock)
    environment = OWN | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": "/dev/null"}
    words = ["make", "--no-print-directory", "--eval", "locked: ; @$(locked)", "locked"]
    done = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True, timeout=120, check=False)
    found = "".join(path.read_text() for path in clone.glob(".venv/lib/python*/site-packages/harmless.py"))
    assert bool(found) is not bool(done.returncode), done.stderr
    return done.stderr, found


@pytest.mark.service
def test_a_package_that_was_changed_on_its_way_is_not_installed(tmp_path: Path, clone: Path) -> None:
    good, bad = wheel(tmp_path / "good", "ours\n"), wheel(tmp_path / "bad", "an attacker's\n")
    lock = f"harmless==1.0 \\\n    --hash=sha256:{hashlib.sha256(good.read_bytes()).hexdigest()}\n"
    said, installed = install(clone, bad.parent, lock)
    assert not installed and "DO NOT MATCH THE HASHES" in said, said
    said, installed = install(clone, bad.parent, "harmless==1.0\n")  # a line of which the digests were taken away
    assert not installed and "--hash" in said, said
    assert install(clone, good.parent, lock)[1] == "ours\n"

    makefile = (clone / "Makefile").read_text()
    (clone / "Makefile").write_text(without := makefile.replace(" --require-hashes", ""))
    assert without != makefile
    assert install(clone, bad.parent, "harmless==1.0\n")[1] == "an attacker's\n"


def test_the_set_up_installs_by_the_lock_and_nothing_before() -> None:
    """What the test above tries is what `make venv` does."""
    recipe = re.search(r"^venv:\n((?:\t.*\n)+)", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert recipe and recipe[1].index("$(locked)") < recipe[1].index("pip install")


def test_every_package_of_the_lock_has_its_digests() -> None:
    packages = re.split(r"\n(?! )", (REPO / "requirements.lock").read_text().strip())
    wrong = [text for text in packages if not re.fullmatch(r"[a-z0-9.-]+==\S+(?: \\\n    --hash=sha256:[0-9a-f]{64})+", text)]
    assert len(packages) > 100 and not wrong
