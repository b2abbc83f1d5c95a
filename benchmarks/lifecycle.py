"""`make bench-lifecycle`: launch, suspend, resume through the whole service, interleaved with the bare hypervisor.

What is timed begins with the user's first byte and ends with the first byte of a 200 (TLS, token, hold and resume included). A suspend
is timed from the call until its snapshot is synced and has its name, `cont` from the request's last byte, both as `torpor trace` has
them: asking the API again and again would take a processor from what is measured. The floor is the best hand-made
sequence, the service's own: a process with everything in place, files put in, device state, `cont`, the agent's answer, then a GET.

A bare name is the p50 of a 512 MiB guest with 2 MiB changed, on a small static server; ROUNDS, SIZES and CHANGES may be set.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from floor import Floor  # noqa: E402
from report import figure, note, percentile, percentiles  # noqa: E402
from service import Instance, until  # noqa: E402
from stored import stored  # noqa: E402
from wire import Endpoint  # noqa: E402

from vmm import seals  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", "15"))
SIZES = [int(one) for one in os.environ.get("SIZES", "512,2048,8192").split(",")]
CHANGES = [int(one) for one in os.environ.get("CHANGES", "2,16,64,256").split(",")]
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
MINIMUM = {512: 512, 2048: 512, 8192: 2048}  # the size to ask for, by what the guest is to see
HERD, CLONES = 40, 50


class Bench:
    """An instance whose guests see `size` MiB, and an image of the small server in it."""

    def __init__(self, size: int, uid: int, **settings: str) -> None:
        self.instance = Instance(f"bench{size}", uid, LIMITS__GUEST_MIB=str(size), STANDBYS__LINKS="8", **settings)
        self.size = size
        self.port = 8080
        self.seen: dict[str, list[float]] = {}

    def start(self) -> None:
        self.instance.start()
        self.ca = self.instance.root / "tls/ca.crt"
        self.api = self.instance.client()
        made = self.instance.directory / "server"
        subprocess.run(["musl-gcc", "-static", "-O2", "-Wall", "-o", str(made), str(REPO / "benchmarks/guest/server.c")], check=True)
        files = {"server": made.read_bytes(), "Dockerfile": (REPO / "benchmarks/guest/Dockerfile").read_bytes()}
        self.arn = self.instance.create("server", self.instance.upload(files), resources=[{"minimumMemoryInMiB": MINIMUM[self.size]}])
        assert self.instance.built(self.arn)["buildState"] == "SUCCESSFUL"

    def close(self) -> None:
        if self.instance.process is not None:
            self.instance.stop()
        self.instance.remove()

    def record(self, name: str, seconds: float) -> None:
        self.seen.setdefault(name, []).append(seconds * 1000)

    def first_byte(self, vm: dict[str, Any], path: str = "/") -> float:
        """Seconds from the connect to the first byte of a 200."""
        started = time.perf_counter()
        one = Endpoint(vm["endpoint"], self.ca)
        one.request(path, vm["token"], X_aws_proxy_port=str(self.port))
        self.sent_at = time.time()
        first = one.sock.recv(12)
        seconds = time.perf_counter() - started
        assert first == b"HTTP/1.1 200", first
        one.close()
        return seconds

    def launch(self) -> dict[str, Any]:
        started = time.perf_counter()
        vm = dict(self.api.run_microvm(imageIdentifier=self.arn, idlePolicy=POLICY))
        self.record("run_reply", time.perf_counter() - started)
        vm["token"] = self.instance.token(vm["microvmId"])
        self.first_byte(vm)
        self.record("launch", time.perf_counter() - started)
        return vm

    def suspend(self, vm: dict[str, Any], cold: bool = True) -> float:
        """Seconds until the snapshot is durable."""
        identifier = vm["microvmId"]
        called = time.time()
        self.api.suspend_microvm(microvmIdentifier=identifier)
        self.instance.state(identifier, "SUSPENDED")
        if cold:
            until(lambda: identifier not in self.instance.hypervisors())
        time.sleep(0.7)  # what is made anew after a while is made: the next figure is of a host at rest
        return self.done_at(vm, "suspend") - called

    def done_at(self, vm: dict[str, Any], work: str) -> float:
        """When the last suspend's snapshot was durable, or the guest of the last resume ran. Seconds of the epoch."""
        found = json.loads(self.instance.command("torpor", "trace", vm["microvmId"], "--json").stdout)
        (one,) = (one for one in found if one["steps"][0]["where"] == "vmm" and one["work"] == work)
        names = [step["what"] for step in one["steps"]]
        steps = one["steps"][: names.index("cont") + 1] if "cont" in names else one["steps"]
        return float(one["started_at"]) + sum(float(step["took_ms"]) for step in steps) / 1e3


def floor_of(bench: Bench, vm: dict[str, Any]) -> Floor:
    """A floor that starts from a copy of this session's snapshot."""
    instance, directory = bench.instance, bench.instance.directory / f"floor-{time.monotonic_ns()}"
    directory.mkdir()
    bench.suspend(vm)
    seals.load(instance.root)
    session = instance.root / "sessions" / vm["microvmId"]
    shutil.copytree(next(session.glob("snapshot-*")), directory / "snapshot")
    shutil.copy(session / "overlay", directory / "overlay.qcow2")
    bench.first_byte(vm)
    image = next(path for path in (instance.root / "images").iterdir() if (path / "manifest.json").exists())
    return Floor(image, vm["microvmId"], directory / "snapshot", directory / "overlay.qcow2", directory)


def cold(bench: Bench, change: int, rounds: int) -> None:
    """Resumes, launches and suspends of a session with `change` MiB changed, each beside the floor's."""
    vm = bench.launch()
    bench.first_byte(vm, f"/dirty?mib={change}")
    floor = floor_of(bench, vm)
    suffix = f"_{change}mib"
    for number in range(rounds + 1):
        if number == 1:
            bench.seen = {name: values for name, values in bench.seen.items() if not name.endswith(suffix)}  # that was warming up
        bench.record(f"suspend{suffix}", bench.suspend(vm))
        bench.record(f"resume{suffix}", bench.first_byte(vm))
        resumed = bench.sent_at
        bench.record(f"next{suffix}", bench.first_byte(vm))
        bench.record(f"to_cont{suffix}", bench.done_at(vm, "resume") - resumed)
        floor.standby()
        bench.record(f"floor_resume{suffix}", floor.restore(is_launch=False))
        bench.record(f"floor_suspend{suffix}", floor.suspend())
        floor.end()
    bench.instance.terminate(vm["microvmId"])
    floor.close()


def launches(bench: Bench, rounds: int) -> None:
    vm = bench.launch()
    floor = floor_of(bench, vm)
    bench.seen["launch"], bench.seen["run_reply"] = [], []
    for _ in range(rounds):
        other = bench.launch()
        bench.instance.terminate(other["microvmId"])
        floor.standby()
        bench.record("floor_launch", floor.restore(is_launch=True))
        floor.end()
        time.sleep(0.7)
    bench.instance.terminate(vm["microvmId"])
    floor.close()


def together(work: Callable[[dict[str, Any]], float], vms: list[dict[str, Any]]) -> float:
    """Seconds until all are answered."""
    threads = [threading.Thread(target=work, args=(vm,)) for vm in vms]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def herd(bench: Bench) -> None:
    """40 sessions asked for at the same moment, over 40 times the floor's processor time divided by the cores: by as many floors at once
    as there are cores, since two threads of one core do not each do what one alone does."""
    vms = [bench.launch() for _ in range(HERD)]
    floors = [floor_of(bench, vm) for vm in vms[: os.cpu_count() or 1]]
    seconds, used = [], []
    for _ in range(3):
        for vm in vms:
            bench.api.suspend_microvm(microvmIdentifier=vm["microvmId"])
        for vm in vms:
            bench.instance.state(vm["microvmId"], "SUSPENDED")
        until(lambda: not set(bench.instance.hypervisors()) & {vm["microvmId"] for vm in vms})
        time.sleep(8)  # what is kept ready is ready again
        seconds.append(together(bench.first_byte, vms))
    for _ in range(5):
        for floor in floors:
            floor.standby()
        before = sum(floor.cpu_seconds() for floor in floors)
        with concurrent.futures.ThreadPoolExecutor(len(floors)) as threads:
            list(threads.map(lambda floor: floor.restore(is_launch=False), floors))
        used.append((sum(floor.cpu_seconds() for floor in floors) - before) / len(floors))
        for floor in floors:
            floor.end()
    least = HERD * percentile(used, 0.5) / (os.cpu_count() or 1)
    figure("herd_40", percentile(seconds, 0.5), "s", "floor", least)
    for vm in vms:
        bench.instance.terminate(vm["microvmId"])
    for floor in floors:
        floor.close()


def clones(bench: Bench) -> None:
    """Memory of 50 idle clones over that of 50 separate ones: what one alone keeps, its image's memory included."""
    group = next(path for path in Path("/sys/fs/cgroup").rglob(f"torpor-{bench.instance.name}") if "memory" in str(path))

    def memory() -> float:
        usage = next(path for path in (group / "memory.usage_in_bytes", group / "memory.current") if path.exists())
        return int(usage.read_text()) / (1 << 20)

    vms = [bench.launch()]
    time.sleep(2)
    one = memory()
    vms += [bench.launch() for _ in range(CLONES - 1)]
    time.sleep(2)
    figure("clone_memory", memory() / CLONES, "MiB", "separate", one)
    for vm in vms:
        bench.instance.terminate(vm["microvmId"])


def warm(bench: Bench, rounds: int) -> None:
    vm = bench.launch()
    bench.first_byte(vm, "/dirty?mib=2")
    for _ in range(rounds):
        bench.suspend(vm, cold=False)
        bench.record("warm", bench.first_byte(vm))
        for _ in range(3):
            bench.record("running", bench.first_byte(vm))
    bench.instance.terminate(vm["microvmId"])


def ahead(bench: Bench, rounds: int) -> None:
    """Launches of the Flask example from microVMs that answered this request before, another one, and none."""
    files = {path.name: path.read_bytes() for path in (REPO / "config/examples/flask").iterdir()}
    uri, bench.port = bench.instance.upload(files, "flask.zip"), 5000
    seen: dict[str, list[float]] = {}
    for name in ("flask", "other", "plain"):
        bench.arn = bench.instance.create(name, uri)
        assert bench.instance.built(bench.arn)["buildState"] == "SUCCESSFUL"
        for _ in range(rounds):
            if name != "plain":
                until(lambda: waiting(bench.instance))
            time.sleep(1.5)
            bench.seen["launch"] = []
            vm = bench.launch()
            seen.setdefault(name, []).extend(bench.seen["launch"])
            bench.instance.terminate(vm["microvmId"])
        if name == "plain":
            vm = bench.launch()
            bench.suspend(vm, cold=False)
            stored(bench.instance.root, vm["microvmId"])
            bench.instance.terminate(vm["microvmId"])
        bench.instance.client().delete_microvm_image(imageIdentifier=bench.arn)
    percentiles("launch_ahead_first_byte", seen["flask"], "ms", "not_ahead", seen["plain"])
    percentiles("launch_ahead_other_page", seen["other"], "ms", "not_ahead", seen["plain"])


def waiting(instance: Instance) -> bool:
    """Whether a microVM that ran ahead waits."""
    port = instance.environment["TORPOR_API__METRICS_PORT"]
    metrics = instance.command("curl", "-s", f"http://127.0.0.1:{port}/metrics").stdout
    return not re.search(r"^torpor_ran_ahead 0", metrics, re.MULTILINE)


def report(bench: Bench) -> None:
    seen = bench.seen
    percentiles("resume_cold_first_byte", seen["resume_2mib"], "ms", "floor", seen["floor_resume_2mib"])
    percentiles("launch_first_byte", seen["launch"], "ms", "floor", seen["floor_launch"])
    percentiles("suspend_durable_ms", seen["suspend_2mib"], "ms", "floor", seen["floor_suspend_2mib"])
    percentiles("run_reply_ms", seen["run_reply"], "ms")
    percentiles("next_request", seen["next_2mib"], "ms")


def sizes(bench: Bench, small: Bench | None) -> None:
    """Of each size and change: the resume, the suspend, and what of the resume is the host's until `cont`."""
    name = f"{bench.size // 1024}gib" if bench.size >= 1024 else f"{bench.size}mib"
    for change in CHANGES:
        suffix = f"_{change}mib"
        if f"resume{suffix}" in bench.seen:
            for what in ("resume", "suspend"):
                percentiles(f"{what}_{name}_{change}mib", bench.seen[what + suffix], "ms", "floor", bench.seen[f"floor_{what}{suffix}"])
            figure(f"to_cont_{name}_{change}mib_ms", percentile(bench.seen[f"to_cont{suffix}"], 0.5), "ms")
    if small is not None:
        peer = percentile(small.seen["resume_2mib"], 0.5)
        figure(f"resume_{name}", percentile(bench.seen["resume_2mib"], 0.5), "ms", "resume_512mib", peer)


def main() -> None:
    small: Bench | None = None
    for number, size in enumerate(SIZES):
        bench = Bench(size, 700_000 + (3 + number % 2) * 262_144)
        try:
            note(f"guests of {size} MiB: building the image")
            bench.start()
            for change in CHANGES:
                note(f"{change} MiB changed")
                cold(bench, change, ROUNDS if change == CHANGES[0] else max(3, ROUNDS // 3))
            if small is None:
                note("launches, a herd, clones")
                launches(bench, ROUNDS)
                report(bench)
                sizes(bench, None)
                herd(bench)
                clones(bench)
            else:
                sizes(bench, small)
        finally:
            bench.close()
        small = small or bench
    paused = Bench(SIZES[0], 700_000 + 3 * 262_144, STANDBYS__WARM="4", IMAGES__RUN_AHEAD='{"flask": ":5000/", "other": ":5000/random"}')
    try:
        note("warm sessions")
        paused.start()
        warm(paused, ROUNDS)
        added = [one - percentile(paused.seen["running"], 0.5) for one in paused.seen["warm"]]
        percentiles("resume_warm_added_ms", added, "ms")
        note("launches from microVMs that ran ahead")
        ahead(paused, max(5, ROUNDS // 2))
    finally:
        paused.close()


if __name__ == "__main__":
    main()
