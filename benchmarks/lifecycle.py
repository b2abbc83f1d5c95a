"""`make bench-lifecycle`: launch, suspend, resume through the whole service, interleaved with the bare hypervisor.

What is timed begins with the user's first byte and ends with the first byte of a 200 (TLS, token, hold and resume
included), or, for a suspend, with the API saying SUSPENDED, which it does when the snapshot is durable.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from floor import Floor  # noqa: E402
from report import note, percentiles  # noqa: E402
from service import Instance, app_files, until  # noqa: E402
from wire import Endpoint  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", "30"))
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
DIRTY_MIB = 8  # what the application changed before it sleeps


class Bench:
    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.ca = instance.root / "tls/ca.crt"
        self.api = instance.client()
        self.seen: dict[str, list[float]] = {}

    def record(self, name: str, seconds: float) -> None:
        self.seen.setdefault(name, []).append(seconds * 1000)

    def first_byte(self, endpoint: str, token: str, path: str = "/state") -> float:
        """Seconds from the connect to the first byte of a 200."""
        started = time.perf_counter()
        one = Endpoint(endpoint, self.ca)
        one.request(path, token)
        first = one.sock.recv(12)
        seconds = time.perf_counter() - started
        assert first == b"HTTP/1.1 200", first
        one.close()
        return seconds

    def launch(self, arn: str) -> dict[str, Any]:
        started = time.perf_counter()
        vm = dict(self.api.run_microvm(imageIdentifier=arn, idlePolicy=POLICY))
        self.record("run_reply_ms", time.perf_counter() - started)
        vm["token"] = self.instance.token(vm["microvmId"])
        self.first_byte(vm["endpoint"], vm["token"])
        self.record("launch_first_byte", time.perf_counter() - started)
        return vm

    def suspend(self, identifier: str) -> None:
        started = time.perf_counter()
        self.api.suspend_microvm(microvmIdentifier=identifier)
        while self.api.get_microvm(microvmIdentifier=identifier)["state"] != "SUSPENDED":
            pass
        self.record("suspend_durable_ms", time.perf_counter() - started)
        until(lambda: identifier not in self.instance.hypervisors())

    def service_round(self, arn: str, vm: dict[str, Any]) -> None:
        self.suspend(vm["microvmId"])
        self.record("resume_cold_first_byte", self.first_byte(vm["endpoint"], vm["token"]))
        self.record("next_request", self.first_byte(vm["endpoint"], vm["token"]))
        other = self.launch(arn)
        self.instance.terminate(other["microvmId"])

    def floor_round(self, floor: Floor) -> None:
        floor.standby()
        self.record("floor_resume", floor.restore(is_launch=False))
        self.record("floor_suspend", floor.suspend())
        floor.end()
        floor.standby()
        self.record("floor_launch", floor.restore(is_launch=True))
        floor.end()


def template(bench: Bench, vm: dict[str, Any], directory: Path) -> Floor:
    """A floor that starts from a copy of this session's snapshot."""
    instance = bench.instance
    bench.suspend(vm["microvmId"])
    session = instance.root / "sessions" / vm["microvmId"]
    snapshot = next(session.glob("snapshot-*"))
    shutil.copytree(snapshot, directory / "snapshot")
    shutil.copy(session / "overlay.qcow2", directory / "overlay.qcow2")
    bench.first_byte(vm["endpoint"], vm["token"])
    image = next(path for path in (instance.root / "images").iterdir() if (path / "manifest.json").exists())
    return Floor(image, directory / "snapshot", directory / "overlay.qcow2", directory)


def main() -> None:
    instance = Instance("bench", 700_000 + 3 * 262_144)
    try:
        instance.start()
        bench = Bench(instance)
        note("building the image")
        arn = instance.create("app", instance.upload(app_files()))
        assert instance.built(arn)["buildState"] == "SUCCESSFUL"
        vm = bench.launch(arn)
        bench.first_byte(vm["endpoint"], vm["token"], f"/dirty?mib={DIRTY_MIB}")
        directory = instance.directory / "floor"
        directory.mkdir()
        floor = template(bench, vm, directory)
        for number in range(ROUNDS + 2):
            if number == 2:
                bench.seen.clear()  # what came before was warming up
            note(f"round {number} of {ROUNDS + 1}")
            bench.service_round(arn, vm)
            bench.floor_round(floor)
        seen = bench.seen
        percentiles("resume_cold_first_byte", seen["resume_cold_first_byte"], "ms", "floor", seen["floor_resume"])
        percentiles("launch_first_byte", seen["launch_first_byte"], "ms", "floor", seen["floor_launch"])
        percentiles("suspend_durable_ms", seen["suspend_durable_ms"], "ms", "floor", seen["floor_suspend"])
        percentiles("run_reply_ms", seen["run_reply_ms"], "ms")
        percentiles("next_request", seen["next_request"], "ms")
        instance.terminate(vm["microvmId"])
    finally:
        if instance.process is not None:
            instance.stop()
        instance.remove()


if __name__ == "__main__":
    main()
