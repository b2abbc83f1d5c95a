"""What tests of images share."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    made = tmp_path_factory.mktemp("fidelity") / "server"
    source = Path(__file__).with_name("server.c")
    subprocess.run(["musl-gcc", "-static", "-Os", "-Wall", "-Werror", "-o", made, source], check=True, timeout=60)
    return made.read_bytes()
