"""`make bench-builds`: a new instance's first build, and builds of the same Dockerfile with another app.py, to the API's SUCCESSFUL.

The first one makes the local base, installs Python in it and boots the kernel; the others find all of that kept.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from report import figure, note, percentile  # noqa: E402
from service import Instance, app_files  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", "5"))


def build(instance: Instance, number: int) -> float:
    """Seconds."""
    files = app_files()
    program = files["app.py"]
    assert isinstance(program, bytes)
    files["app.py"] = program + f"\n# change {number}\n".encode()
    uri = instance.upload(files, f"app-{number}.zip")
    started = time.perf_counter()
    made = instance.built(instance.create(f"app-{number}", uri))
    assert made["buildState"] == "SUCCESSFUL", made
    seconds = time.perf_counter() - started
    note(f"build {number}: {seconds:.1f} s")
    return seconds


def main() -> None:
    instance = Instance("bench-builds", 700_000 + 3 * 262_144)
    try:
        instance.start()
        seconds = [build(instance, number) for number in range(ROUNDS + 1)]
        figure("second_build", percentile(seconds[1:], 0.5), "s", "first_build", seconds[0])
    finally:
        if instance.process is not None:
            instance.stop()
        instance.remove()


if __name__ == "__main__":
    main()
