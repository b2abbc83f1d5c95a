"""`make demo`: the whole walk-through on real microVMs, each step as the command a user would type, with its output.

Ends with a table of what was measured, and with an exit code that is not zero if any state was lost or a step failed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gateway.config import Settings
from gateway.status import is_living, living
from vmm.cgroups import Cgroups
from vmm.qemu import roots

REPO = Path(__file__).resolve().parents[1]
BIN = Path(sys.prefix) / "bin"
ROOT = Path(os.environ.get("TORPOR_DEMO_ROOT", "/var/lib/torpor-demo"))
RUN, NAME = Path("/run/torpor"), "demo"
BUCKET, IMAGE, PORT = "demo-artifacts", "flask-demo", "5000"
ACCOUNT = "123456789012"
LAUNCHES = 5
SERVE_SECONDS, BUILD_SECONDS, STATE_SECONDS = 120, 600, 120

console = Console(highlight=False, soft_wrap=True)
environment = dict(os.environ)
figures: list[tuple[str, str]] = []


class DemoFailed(Exception):
    pass


def step(number: int, text: str) -> None:
    console.print(f"\n[bold cyan]{number}. {text}[/]")


def check(truth: bool, text: str) -> None:
    if not truth:
        raise DemoFailed(text)


def shown(command: list[str]) -> str:
    words = [Path(word).name if word.startswith(str(BIN)) else word for word in command]
    return shlex.join([word if len(word) < 400 else word[:24] + "..." for word in words])


def run(*command: str, quiet: bool = False, deadline: float = 60) -> str:
    """Runs a command as typed; shows it and its output; returns its standard output."""
    if not quiet:
        console.print(f"[green]$ {shown(list(command))}[/]", markup=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=deadline, check=False)
    if not quiet and done.stdout.strip():
        print(done.stdout.rstrip(), flush=True)
    if done.returncode:
        print(done.stderr.rstrip(), file=sys.stderr, flush=True)
        raise DemoFailed(f"{shown(list(command))} exited with {done.returncode}")
    return done.stdout


def aws(*arguments: str, quiet: bool = False) -> dict[str, object]:
    text = run(str(BIN / "aws"), *arguments, quiet=quiet)
    return json.loads(text) if text.strip().startswith("{") else {}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def serve() -> subprocess.Popen[str]:
    environment.update(
        TORPOR_ROOT=str(ROOT), TORPOR_RUN=str(RUN), TORPOR_NAME=NAME, TORPOR_API__PORT=str(free_port()),
        TORPOR_STANDBYS__WARM="0",  # to show that what sleeps costs no process
        TORPOR_API__METRICS_PORT=str(free_port()), TORPOR_OBJECT_STORE__PORT=str(free_port()),
        PATH=f"{BIN}:{environment['PATH']}",
    )  # fmt: skip
    console.print(f"[green]$ torpor serve --root {ROOT} --name {NAME}[/]")
    ROOT.mkdir(parents=True, exist_ok=True)
    log = (ROOT / "serve.log").open("w")
    process = subprocess.Popen([str(BIN / "torpor"), "serve"], env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        print(line.rstrip(), flush=True)
        if line.startswith("export "):
            name, _, value = line.removeprefix("export ").strip().partition("=")
            environment[name] = value
            if name == "CURL_CA_BUNDLE":
                return process
    raise DemoFailed(f"torpor serve ended: {(ROOT / 'serve.log').read_text()[-2000:]}")


def end_earlier() -> None:
    """Ends the processes of a demo that was itself ended before it could: they hold its lock and its ports."""
    with contextlib.suppress(FileNotFoundError), (RUN / NAME / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.kill(int(lock.read()), signal.SIGKILL)
            fcntl.flock(lock, fcntl.LOCK_EX)
    for child in living(RUN / NAME / "supervisor.json"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        await_that(lambda child=child: not is_living(child), f"process {child.pid} does not end")


def clear_earlier() -> None:
    """Removes the microVMs and the image of such a demo."""

    def images() -> list[dict[str, object]]:
        return list(json.loads(run("torpor", "images", "--json", quiet=True)))

    left = [str(vm["microvmId"]) for vm in json.loads(run("torpor", "ps", "--json", quiet=True))]
    if left or images():
        console.print("   an earlier demo was ended in its middle: its microVMs and its image go first")
    if left:
        run("torpor", "terminate", *left, quiet=True, deadline=STATE_SECONDS)
    await_that(lambda: not [one for one in images() if one["state"] in ("CREATING", "UPDATING")], "the earlier image's build does not end")
    for image in images():
        aws("lambda-microvms", "delete-microvm-image", "--image-identifier", str(image["imageArn"]), quiet=True)
    await_that(lambda: not images(), "the earlier image is still there")


def await_that(is_true: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + STATE_SECONDS
    while not is_true():
        check(time.monotonic() < deadline, otherwise)
        time.sleep(0.1)


def build() -> str:
    archive = ROOT / "app.zip"
    source = REPO / "config/examples/flask"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for file in sorted(source.iterdir()):
            if file.is_file():
                out.write(file, file.name)
    print((source / "Dockerfile").read_text())
    aws("s3", "mb", f"s3://{BUCKET}")
    aws("s3", "cp", str(archive), f"s3://{BUCKET}/app.zip", "--no-progress")
    started = time.monotonic()
    made = aws(
        "lambda-microvms", "create-microvm-image", "--name", IMAGE,
        "--base-image-arn", "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1",
        "--build-role-arn", f"arn:aws:iam::{ACCOUNT}:role/build", "--code-artifact", f"uri=s3://{BUCKET}/app.zip",
        "--resources", "minimumMemoryInMiB=512",
    )  # fmt: skip
    arn = str(made["imageArn"])
    follow_build(arn)
    figures.append(("build", f"{time.monotonic() - started:.1f} s"))
    return arn


def follow_build(arn: str) -> None:
    """The build log, live, through the log store's read calls."""
    listing = aws("lambda-microvms", "list-microvm-image-builds", "--image-identifier", arn, "--image-version", "1.0", quiet=True)
    build_id = listing["items"][0]["buildId"]  # type: ignore[index]
    import boto3

    os.environ.update({name: environment[name] for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")})
    logs, vms, token, deadline = boto3.client("logs"), boto3.client("lambda-microvms"), {}, time.monotonic() + BUILD_SECONDS
    console.print(
        f"[green]$ aws logs get-log-events --log-group-name /aws/lambda-microvms/{IMAGE} --log-stream-name build/1.0/{build_id}[/]"
    )
    while True:
        state = vms.get_microvm_image(imageIdentifier=arn)["state"]
        try:
            page = logs.get_log_events(
                logGroupName=f"/aws/lambda-microvms/{IMAGE}", logStreamName=f"build/1.0/{build_id}", startFromHead=True, **token
            )
            for event in page["events"]:
                print(f"   {event['message']}", flush=True)
            token = {"nextToken": page["nextForwardToken"]}
        except logs.exceptions.ResourceNotFoundException:
            page = {"events": []}
        if state != "CREATING" and not page["events"]:
            break
        check(time.monotonic() < deadline, "the build did not end in time")
        time.sleep(0.2)
    check(state == "CREATED", f"the image is {state}")


def wait_state(identifier: str, wanted: str) -> None:
    deadline = time.monotonic() + STATE_SECONDS
    while True:
        vm = aws("lambda-microvms", "get-microvm", "--microvm-identifier", identifier, quiet=True)
        if vm["state"] == wanted:
            console.print(f"   state: [bold]{wanted}[/]")
            return
        check(vm["state"] not in ("TERMINATED",) and time.monotonic() < deadline, f"{identifier} is {vm['state']}: {vm.get('stateReason')}")
        time.sleep(0.1)


def launch(arn: str, quiet: bool = False) -> dict[str, object]:
    policy = "maxIdleDurationSeconds=60,suspendedDurationSeconds=3600,autoResumeEnabled=true"
    return aws(
        "lambda-microvms", "run-microvm", "--image-identifier", arn, "--idle-policy", policy,
        "--execution-role-arn", f"arn:aws:iam::{ACCOUNT}:role/app", quiet=quiet,
    )  # fmt: skip


def call(vm: dict[str, object], token: str, quiet: bool = False) -> tuple[dict[str, float], float]:
    """One GET with curl; the answer and the seconds it took."""
    command = [
        "curl", "-sS", "--fail-with-body", "--cacert", environment["CURL_CA_BUNDLE"], "-H", f"X-aws-proxy-auth: {token}",
        "-H", f"X-aws-proxy-port: {PORT}", "-w", "\n%{time_total}", f"https://{vm['endpoint']}/",
    ]  # fmt: skip
    if not quiet:
        console.print(f"[green]$ curl -H 'X-aws-proxy-auth: '$TOKEN -H 'X-aws-proxy-port: 5000' https://{vm['endpoint']}/[/]")
    text, _, seconds = run(*command, quiet=True).rpartition("\n")
    if not quiet:
        print(text.rstrip(), flush=True)
    return json.loads(text), float(seconds)


def first_answer(vm: dict[str, object], token: str, quiet: bool = False) -> dict[str, float]:
    deadline = time.monotonic() + STATE_SECONDS
    while True:
        try:
            return call(vm, token, quiet)[0]
        except DemoFailed:
            check(time.monotonic() < deadline, "no answer")


def mint(identifier: str, quiet: bool = False) -> str:
    answer = aws(
        "lambda-microvms", "create-microvm-auth-token", "--microvm-identifier", identifier,
        "--expiration-in-minutes", "30", "--allowed-ports", f"port={PORT}", quiet=quiet,
    )  # fmt: skip
    return str(answer["authToken"]["X-aws-proxy-auth"])  # type: ignore[index]


def hypervisors() -> dict[str, dict[str, object]]:
    """Hypervisor processes of the instance, by their directory's name."""
    return {path.parent.name: json.loads(path.read_text()) for path in (RUN / NAME / "vms").glob("*/process.json")}


def suspend(identifier: str) -> None:
    session = ROOT / "sessions" / identifier
    if os.environ.get("IDLE") == "1":
        console.print("   IDLE=1: nothing is sent for the idle policy's 60 seconds")
        time.sleep(60)
    else:
        started = time.monotonic()
        aws("lambda-microvms", "suspend-microvm", "--microvm-identifier", identifier)
    wait_state(identifier, "SUSPENDED")
    if os.environ.get("IDLE") != "1":
        figures.append(("suspend, as a poll of the API sees it", f"{time.monotonic() - started:.2f} s"))
    deadline = time.monotonic() + 10
    while any(record["session"] == identifier for record in hypervisors().values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    run("du", "-ah", "--apparent-size", *map(str, sorted(session.glob("snapshot-*"))))
    size = sum(file.stat().st_blocks * 512 for file in session.rglob("*") if file.is_file())
    figures.append(("snapshot on disk (memory, devices, disk overlay)", f"{size / 2**20:.1f} MiB"))
    holding = [name for name, record in hypervisors().items() if record["session"] == identifier]
    check(not holding, f"the suspended microVM still has a hypervisor: {holding}")
    console.print("   no hypervisor process holds this microVM: it uses no CPU and no memory")


def walk(arn: str) -> None:
    step(3, "Launch")
    started = time.monotonic()
    vm = launch(arn)
    identifier = str(vm["microvmId"])
    token = mint(identifier, quiet=True)
    before = first_answer(vm, token, quiet=True)
    figures.append(("run-microvm to the first 200, aws CLI and curl included", f"{time.monotonic() - started:.2f} s"))
    wait_state(identifier, "RUNNING")

    step(4, "Call it")
    token = mint(identifier)
    for _ in range(2):
        answer, seconds = call(vm, token)
        check(answer["counter"] == before["counter"] + 1 == answer["file_lines"], "the counter or the file does not go up")
        before = answer
    figures.append(("a request to a running microVM", f"{seconds * 1000:.0f} ms"))

    step(5, "Put it to sleep")
    suspend(identifier)

    step(6, "One request wakes it; the connection is held meanwhile")
    answer, seconds = call(vm, token)
    check(answer["counter"] == before["counter"] + 1 == answer["file_lines"], "state was lost: counter or file")
    check(before["ticks"] <= answer["ticks"] < before["ticks"] + 200, "the ticking thread did not go on where it was")
    check(answer["pid"] == before["pid"], "the application is another process")
    check(abs(answer["time"] - time.time()) < 1, "the guest's clock is wrong")
    following, again = call(vm, token)
    check(following["ticks"] >= answer["ticks"], "the thread stands still")
    figures.append(("held, resumed and answered", f"{seconds * 1000:.0f} ms"))
    figures.append(("the following request", f"{again * 1000:.0f} ms"))
    herd(arn, identifier)


def herd(arn: str, first: str) -> None:
    step(7, f"{LAUNCHES} more from the same image at once")

    def one(_: int) -> tuple[str, str, float, dict[str, float]]:
        started = time.monotonic()
        vm = launch(arn, quiet=True)
        token = mint(str(vm["microvmId"]), quiet=True)
        answer = first_answer(vm, token, quiet=True)
        return str(vm["microvmId"]), str(vm["endpoint"]), time.monotonic() - started, answer

    with ThreadPoolExecutor(LAUNCHES) as pool:
        made = list(pool.map(one, range(LAUNCHES)))
    for identifier, endpoint, seconds, answer in made:
        print(f"   {identifier}  {endpoint}  {seconds:.2f} s  counter {answer['counter']:.0f}, file lines {answer['file_lines']:.0f}")
        check(answer["counter"] == 1 and answer["file_lines"] == 1, "a clone has another's state")
    check(len({endpoint for _, endpoint, _, _ in made}) == LAUNCHES, "endpoints are not distinct")
    figures.append((f"{LAUNCHES} launches at once, slowest, aws CLI included", f"{max(seconds for _, _, seconds, _ in made):.2f} s"))
    groups = Cgroups(NAME, ROOT)
    memory = [groups.memory_bytes(name) for name, record in hypervisors().items() if record["session"]]
    figures.append(("memory per microVM (what it does not share)", f"{sum(memory) / len(memory) / 2**20:.0f} MiB"))
    step(8, "Clear up")
    run("torpor", "terminate", first, *(identifier for identifier, _, _, _ in made), deadline=120)
    run("torpor", "ps", "--all")


def leftovers(first_uid: int, ports: list[int]) -> list[str]:
    """What would show that something stayed: processes, mounts, control groups, sockets, files outside the directory."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue
        if first_uid <= int(fields["Uid"].split()[0]) < first_uid + 3 * 65536:
            found.append(f"process {status.parent.name} ({fields['Name'].strip()})")
    found += [
        f"mount {line.split()[1]}" for line in Path("/proc/mounts").read_text().splitlines() if f"{RUN}/{NAME}" in line or str(ROOT) in line
    ]
    found += [f"control group {path}" for path in Path("/sys/fs/cgroup").glob(f"**/torpor-{NAME}")]
    found += [f"file {path}" for path in [RUN / NAME] if path.exists()]
    for name in ("session", "image"):  # beside the mark of the instance, whose directory it is
        found += [f"{name} {path}" for path in (ROOT / f"{name}s").glob("*") if path.name != "instance-id"]
    for port in ports:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                found.append(f"listener on port {port}")
    return found


@contextlib.contextmanager
def forwarding_as_it_was() -> Iterator[None]:
    """A service lets its host forward packets for as long as others may have asked for that too; a demo knows when it is over."""
    setting = Path("/proc/sys/net/ipv4/ip_forward")
    before = setting.read_text()
    try:
        yield
    finally:
        if setting.read_text() != before:
            setting.write_text(before)


def main() -> int:
    with forwarding_as_it_was():
        return demo()


def demo() -> int:
    started = time.monotonic()
    process: subprocess.Popen[str] | None = None
    try:
        end_earlier()
        step(1, "Start the service, the object store, the certificate authority and the AWS profile")
        process = serve()
        print((ROOT / "aws/config").read_text())
        step(2, "Build an image from a zip with a Dockerfile")
        clear_earlier()
        arn = build()
        walk(arn)
        aws("lambda-microvms", "delete-microvm-image", "--image-identifier", arn)
        await_that(lambda: not json.loads(run("torpor", "images", "--json", quiet=True)), "the image is still there")
        ports = [int(environment[name]) for name in environment if name.startswith("TORPOR_") and name.endswith("PORT")]
        ports.append(int((ROOT / "edge-port").read_text()))
        process.send_signal(signal.SIGTERM)
        check(process.wait(SERVE_SECONDS) == 0, "torpor serve did not end well")
        process = None
        roots.need_of(Settings().cache, ROOT).unlink(missing_ok=True)  # its image is gone, and what it was made by is not needed
        left = leftovers(int(os.environ.get("TORPOR_USERS__FIRST", "640000")), ports)
        for line in left:
            console.print(f"   [red]left: {line}[/]")
        check(not left, "something was left behind")
        console.print(f"   nothing is left: no process, namespace, tap, mount, control group, socket, or file outside {ROOT}")
    except (DemoFailed, subprocess.TimeoutExpired) as error:
        console.print(f"\n[bold red]The demo failed:[/] {error}")
        log = ROOT / "serve.log"
        console.print(f"The service's log is {log}" if log.exists() else "", markup=False)
        return 1
    finally:
        if process is not None and process.poll() is None:
            process.terminate()
            process.wait(SERVE_SECONDS)
    step(9, "What it took")
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in [*figures, ("the whole demo", f"{time.monotonic() - started:.0f} s")]:
        table.add_row(name, f"[bold]{value}[/]")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
