"""The units of systemd that operators install: systemd itself reads them, and what they rely on in the code is there."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.config import Settings

REPO = Path(__file__).resolve().parents[2]


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((REPO / "config" / name).read_text())
    return parser


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here (package systemd)")
@pytest.mark.parametrize("name", ["torpor.service", "torpor.socket"])
def test_systemd_finds_nothing_wrong(tmp_path: Path, name: str) -> None:
    for one in ("torpor.service", "torpor.socket"):
        (tmp_path / one).write_text((REPO / "config" / one).read_text().replace("/opt/torpor/.venv/bin/torpor", "/bin/true"))
    environment = os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if "torpor" in line]
    assert not said and done.returncode == 0, done.stderr


def test_microvms_outlive_the_service(tmp_path: Path) -> None:
    """A unit that ends its whole group ends nothing of ours but the main process; what it says of times fits the service's own."""
    service = unit("torpor.service")["Service"]
    assert service["KillMode"] == "process" and service["Type"] == "notify" and service["Restart"] == "always"
    assert "Delegate" not in service, "microVMs have a scope of their own: left in the unit's group they would keep it from a new start"
    assert int(service["TimeoutStopSec"]) > Settings(root=tmp_path).service.stop_seconds


@pytest.mark.skipif(os.geteuid() != 0, reason="serve needs root")
def test_what_stays_wrong_is_not_tried_for_ever_and_what_may_pass_is(tmp_path: Path) -> None:
    """A wrong setting ended with status 1, and systemd started the service again each second."""
    prevented = unit("torpor.service")["Service"]["RestartPreventExitStatus"].split()
    command = [str(Path(sys.prefix) / "bin/torpor"), "serve", "--root", str(tmp_path)]

    def status() -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd="/")
        assert any(name in done.stderr for name in ("torpor.toml", "min_idle_seconds")), done.stderr
        return str(done.returncode)

    for text in ("[limits]\nmin_idle_seconds = 'many'\n", "no TOML at all"):
        (tmp_path / "torpor.toml").write_text(text)
        assert status() in prevented
    (tmp_path / "torpor.toml").unlink()
    (tmp_path / "torpor.toml").symlink_to("/proc/self/mem")  # an error of input and output
    assert status() not in prevented
