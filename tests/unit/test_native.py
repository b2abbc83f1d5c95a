"""The edge's compiled form is used for exactly the sources that it was made from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.edge import native
from gateway.edge.client import http1

REPO = Path(__file__).resolve().parents[2]


def test_these_tests_run_on_what_was_compiled_from_these_sources() -> None:
    assert http1.__file__.endswith(".so") == (native.is_wanted() and native.directory().is_dir())


def test_an_edit_leaves_the_compiled_form_aside(tmp_path: Path) -> None:
    before = native.directory()
    shutil.copytree(REPO / "gateway", tmp_path / "gateway")
    show = "from gateway.edge import native; print(native.directory())"

    def directory() -> str:
        return subprocess.run([sys.executable, "-c", show], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    assert directory() == str(before)
    with (tmp_path / "gateway/edge/client/http1.py").open("a") as file:
        file.write("\n# edited\n")
    assert directory() != str(before)


def test_what_is_left_of_other_sources_is_void_before_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is killed while it is removed leaves half of it, and these sources may be wanted again: under its name it would be trusted."""
    (tmp_path / "lib/torpor-edge-0123456789abcdef/client").mkdir(parents=True)
    (tmp_path / "lib/torpor-edge-killed/objects").mkdir(parents=True)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(native.os, "chdir", lambda path: None)
    seen: list[str] = []

    def stopped(*_: object, **__: object) -> None:
        seen.extend(path.name for path in (tmp_path / "lib").iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("mypyc.build.mypycify", stopped)
    monkeypatch.setattr(shutil, "rmtree", stopped)
    with pytest.raises(KeyboardInterrupt):
        native.build()
    assert seen and not {"torpor-edge-0123456789abcdef", "torpor-edge-killed"} & set(seen)


@pytest.mark.service
def test_the_sources_themselves_run_as_well() -> None:
    tests = [f"tests/unit/test_{name}.py" for name in ("edge", "http2", "parking", "fairness", "application_faults", "one_exception")]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        words, cwd=REPO, env={**os.environ, "TORPOR_INTERPRETED": "1"}, capture_output=True, text=True, timeout=120, check=False
    )
    assert not done.returncode, done.stdout[-2000:]
