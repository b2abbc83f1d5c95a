"""Runs in the machine: installs the units as their first lines tell an operator, and tries what docs/operations.md promises of them.

Each step is a line of JSON on standard output. A step that fails does not keep the others from being tried.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from service import Instance, app_files, until  # noqa: E402

from gateway.config import Settings  # noqa: E402
from gateway.instance import wildcard  # noqa: E402

STATE = Path("/var/lib/trial.json")
UNITS = Path("/etc/systemd/system")
CGROUPS = Path("/sys/fs/cgroup")
SCOPE = "system.slice/torpor-default-microvms.scope"
SETTINGS = "probe_seconds = 120\n[standbys]\nper_image = 0\nahead = 0\nwarm = 0\n"
SOCKET = '[edge]\naddresses = ["systemd"]\n'
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
START_SECONDS, BUILD_SECONDS, STATE_SECONDS = 600, 900, 240


class Installed(Instance):
    """The instance that the unit serves, with every setting at its default."""

    def __init__(self) -> None:
        settings = Settings()
        self.root, self.run, self.name = settings.root, settings.run, settings.name
        self.environment = dict(os.environ) | {
            "TORPOR_API__PORT": str(settings.api.port), "TORPOR_OBJECT_STORE__PORT": str(settings.object_store.port),
        }  # fmt: skip
        self._clients: dict[str, Any] = {}

    def answer(self, vm: dict[str, Any]) -> dict[str, Any]:
        """One request through the endpoint: the application counts it in memory and on its disk."""
        token = self.token(vm["microvmId"])
        said = self.command(
            "curl", "-sS", "--fail-with-body", "--max-time", "200", "--cacert", str(self.root / "tls/bundle.crt"), "-H", f"X-aws-proxy-auth: {token}",
            f"https://{vm['endpoint']}/", deadline=240,
        )  # fmt: skip
        return dict(json.loads(said.stdout))


one = Installed()
vms: dict[str, dict[str, Any]] = {}
counts: dict[str, int] = {}
steps: list[Callable[[], object]] = []
past: dict[str, Any] = json.loads(STATE.read_text()) if STATE.exists() else {}  # what this trial knew before the machine's last restart


def step(work: Callable[[], object]) -> Callable[[], object]:
    steps.append(work)
    return work


def systemctl(*words: str, deadline: float = START_SECONDS) -> str:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=deadline, check=False)
    if done.returncode:
        journal = subprocess.run(
            ["journalctl", "-u", "torpor", "-n", "40", "--no-pager", "-o", "cat"], capture_output=True, text=True, check=False
        )
        raise AssertionError(f"systemctl {' '.join(words)}: {done.stderr}\n{journal.stdout[-4000:]}")
    return done.stdout


def shown(unit: str = "torpor.service") -> dict[str, str]:
    return dict(line.split("=", 1) for line in systemctl("show", unit).splitlines() if "=" in line)


def main_pid() -> int:
    return int(shown()["MainPID"])


def replaced(old: int, seconds: float) -> int:
    """The main process that systemd has started in the place of `old`, when it has said that it serves."""

    def found() -> int:
        state = shown()
        return int(state["MainPID"]) if state["ActiveState"] == "active" and state["MainPID"] not in ("0", str(old)) else 0

    return int(until(found, seconds, 0.2))


def hypervisor(name: str) -> int:
    return int(one.hypervisors()[vms[name]["microvmId"]]["pid"])


def goes_on(name: str) -> None:
    """The next request finds what the one before has left, in memory and on the disk."""
    said = one.answer(vms[name])
    counts[name] += 1
    assert said["counter"] == said["lines"] == counts[name], f"{name}: {said['counter']}, {said['lines']} instead of {counts[name]}"


def sleep(name: str) -> None:
    identifier = vms[name]["microvmId"]
    one.client().suspend_microvm(microvmIdentifier=identifier)
    one.state(identifier, "SUSPENDED", seconds=STATE_SECONDS)


def machine_restarts(step: str, how: Callable[[], object]) -> None:
    """Returns after the restart, in the process that goes on with this step then."""
    if past.get("step") != step:
        STATE.write_text(json.dumps({"step": step, "vms": vms, "counts": counts}, default=str))
        os.sync()
        how()
        signal.pause()
    replaced(0, START_SECONDS)


def group_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::/")


@step
def starts_and_says_that_it_serves() -> object:
    for name in ("torpor.service", "torpor.socket"):
        (UNITS / name).write_text((REPO / "config" / name).read_text().replace("/opt/torpor", str(REPO)))
    one.root.mkdir(parents=True)
    (one.root / "torpor.toml").write_text(SETTINGS)
    systemctl("daemon-reload")
    systemctl("enable", "--now", "torpor", deadline=START_SECONDS)
    state = shown()
    assert (state["ActiveState"], state["SubState"], state["StatusText"]) == ("active", "running", "serving"), state
    assert json.loads(one.command("curl", "-sS", "--fail-with-body", "http://127.0.0.1:4701/readyz").stdout)
    return {"accelerator": one.command(str(REPO / ".venv/bin/torpor"), "doctor", check=False).stdout[-3000:]}


@step
def replaces_its_workers_at_a_reload() -> None:
    before, edge = main_pid(), one.pid_of("edge-0")
    systemctl("reload", "torpor")
    until(lambda: shown()["ActiveState"] == "active", 60, 0.2)
    assert main_pid() == before and one.pid_of("edge-0") != edge


@step
def is_started_again_after_a_kill() -> None:
    before = main_pid()
    os.kill(before, signal.SIGKILL)
    replaced(before, START_SECONDS)
    assert shown()["NRestarts"] == "1"


@step
def ends_wholly_at_a_stop() -> None:
    systemctl("stop", "torpor")
    assert shown()["ActiveState"] == "inactive" and shown()["Result"] == "success", shown()
    left = [CGROUPS / "system.slice/torpor.service", CGROUPS / SCOPE]
    until(lambda: not any(group.exists() for group in left), 20)
    systemctl("start", "torpor")


@step
def builds_an_image() -> None:
    there = not Path("/var/cache/torpor/base.tar.key").read_text().startswith("registry")  # the local base has Python
    arn = one.create("app", one.upload(app_files(**{"RUN dnf install -y python3 && dnf clean all\n": ""} if there else {})))
    build = one.built(arn, seconds=BUILD_SECONDS)
    assert build["buildState"] == "SUCCESSFUL", build
    vms["image"] = {"arn": arn}


@step
def launches_microvms_that_answer() -> None:
    for name in ("awake", "asleep"):
        vms[name] = dict(one.client().run_microvm(imageIdentifier=vms["image"]["arn"], idlePolicy=POLICY))
        counts[name] = 0
        one.state(vms[name]["microvmId"], "RUNNING", seconds=STATE_SECONDS)
        goes_on(name)


@step
def has_microvms_in_a_delegated_scope_beside_the_unit() -> object:
    group = group_of(hypervisor("awake"))
    assert group.startswith(f"{SCOPE}/") and group_of(main_pid()) == "system.slice/torpor.service", group
    scope = shown("torpor-default-microvms.scope")
    assert scope["Delegate"] == "yes" and "torpor.service" in scope["Before"].split(), scope
    assert (CGROUPS / group / "memory.max").read_text().strip().isdigit() and (CGROUPS / group / "pids.max").read_text().strip().isdigit()
    return {"group": group}


@step
def keeps_microvms_when_its_main_process_is_killed() -> None:
    sleep("asleep")
    before, process = main_pid(), hypervisor("awake")
    os.kill(before, signal.SIGKILL)
    goes_on("awake")  # through the edge that serves on meanwhile
    replaced(before, START_SECONDS)
    assert hypervisor("awake") == process, "another hypervisor"
    goes_on("awake")
    goes_on("asleep")


@step
def keeps_microvms_when_all_of_the_unit_is_killed() -> None:
    """Also when what holds the microVMs' scope is killed, beside which systemd makes no other."""
    before, process = main_pid(), hypervisor("awake")
    for pid in (CGROUPS / SCOPE / "holder/cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    systemctl("kill", "--kill-whom=all", "--signal=KILL", "torpor")
    replaced(before, START_SECONDS)
    assert hypervisor("awake") == process, "another hypervisor"
    goes_on("awake")


@step
def keeps_microvms_over_a_restart() -> None:
    sleep("asleep")
    systemctl("restart", "torpor")
    goes_on("awake")
    assert one.describe(vms["asleep"]["microvmId"])["state"] == "SUSPENDED"
    goes_on("asleep")


@step
def keeps_microvms_over_a_stop_and_a_start() -> None:
    sleep("asleep")
    systemctl("stop", "torpor")
    assert not one.hypervisors(), "a stop suspends what runs"
    systemctl("start", "torpor")
    goes_on("awake")
    goes_on("asleep")


@step
def leaves_a_microvm_running_that_it_cannot_suspend_at_a_stop() -> None:
    """Its daemon stands still: the stop ends within its time, and the hypervisor goes on (docs/operations.md, SIGTERM)."""
    process = hypervisor("awake")
    (one.root / "torpor.toml").write_text(SETTINGS + "[service]\nstop_seconds = 40\n")
    systemctl("restart", "torpor")
    goes_on("awake")
    process = hypervisor("awake")
    os.kill(one.pid_of("vmm"), signal.SIGSTOP)
    started = time.monotonic()
    systemctl("stop", "torpor")
    assert time.monotonic() - started < 90
    assert group_of(process).startswith(SCOPE)
    systemctl("start", "torpor")
    assert hypervisor("awake") == process
    goes_on("awake")


@step
def is_replaced_by_the_watchdog_when_it_stands_still() -> None:
    before, process = main_pid(), hypervisor("awake") if "awake" in vms else 0
    os.kill(before, signal.SIGSTOP)
    replaced(before, 60 + START_SECONDS)
    journal = systemctl_journal()
    assert "Watchdog timeout" in journal and "Fatal Python error: Aborted" in journal, "where it stood"
    if process:
        assert hypervisor("awake") == process
        goes_on("awake")


def is_answered() -> None:
    """Whoever asks for an endpoint that is nobody's is told so, by the edge."""
    endpoint = wildcard(Settings()).replace("*", "nobody")
    said = one.command(
        "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", str(START_SECONDS - 20), "--cacert", str(one.root / "tls/bundle.crt"),
        f"https://{endpoint}/", deadline=START_SECONDS,
    )  # fmt: skip
    assert said.stdout[:1] == "4", said.stdout


@step
def is_started_by_a_connection_that_waits_for_it() -> None:
    systemctl("stop", "torpor")
    (one.root / "torpor.toml").write_text(SETTINGS + SOCKET)
    systemctl("enable", "--now", "torpor.socket")
    assert shown()["ActiveState"] == "inactive"
    is_answered()
    assert until(lambda: shown()["ActiveState"] == "active", START_SECONDS, 0.2)
    if "awake" in vms:
        goes_on("awake")


@step
def holds_a_connection_while_it_is_restarted() -> None:
    systemctl("--no-block", "restart", "torpor")
    until(lambda: shown()["ActiveState"] != "active", 60, 0.05)
    for _ in range(3):
        is_answered()
    until(lambda: shown()["ActiveState"] == "active", START_SECONDS, 0.2)


@step
def has_its_microvms_again_after_a_shutdown_of_the_host() -> None:
    """What ran is suspended before it: the scope of microVMs ends after the service."""
    machine_restarts("has_its_microvms_again_after_a_shutdown_of_the_host", lambda: systemctl("reboot"))
    for name in ("awake", "asleep"):
        goes_on(name)


@step
def has_what_slept_after_a_power_cut() -> None:
    def cut() -> None:
        sleep("asleep")
        Path("/proc/sysrq-trigger").write_text("b")

    machine_restarts("has_what_slept_after_a_power_cut", cut)
    ended = one.state(vms["awake"]["microvmId"], "TERMINATED", seconds=STATE_SECONDS)
    assert ended["stateReason"], ended
    goes_on("asleep")


def systemctl_journal() -> str:
    return subprocess.run(["journalctl", "-u", "torpor", "--no-pager", "-o", "cat"], capture_output=True, text=True, check=True).stdout


def main() -> None:
    vms.update(past.get("vms", {}))
    counts.update(past.get("counts", {}))
    names = [work.__name__ for work in steps]
    for work in steps[names.index(past["step"]) if past else 0 :]:
        started, told, error = time.monotonic(), None, ""
        try:
            told = work()
        except Exception:
            error = f"{traceback.format_exc()}\n{systemctl_journal()[-6000:]}"
        print(
            json.dumps({"step": work.__name__, "seconds": round(time.monotonic() - started, 1), "told": told, "error": error}), flush=True
        )


if __name__ == "__main__":
    main()
