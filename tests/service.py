"""A real instance for tests: `torpor serve` with its own root, name, ports and users, and clients for it."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from gateway.config import Settings
from vmm.qemu import roots

REPO = Path(__file__).resolve().parents[1]
BIN = Path(sys.prefix) / "bin"
BUCKET = "artifacts"
ROLE = "arn:aws:iam::123456789012:role/test"
BASE = "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1"

HOOKS = {
    "port": 9000,
    "microvmImageHooks": {"ready": "ENABLED", "readyTimeoutInSeconds": 60},
    "microvmHooks": {
        "run": "ENABLED", "runTimeoutInSeconds": 10, "resume": "ENABLED", "resumeTimeoutInSeconds": 10,
        "suspend": "ENABLED", "suspendTimeoutInSeconds": 10, "terminate": "ENABLED", "terminateTimeoutInSeconds": 10,
    },
}  # fmt: skip


_handed_out: set[int] = set()
everywhere: dict[str, str] = {}  # settings of every instance of a run (`--setting`)
PATIENCE = float(os.environ.get("TESTS_PATIENCE", "1"))  # what a machine whose processor is emulated takes longer


def free_port() -> int:
    """Never the same twice in a run: what asked for one may not have bound it yet."""
    while True:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = int(sock.getsockname()[1])
        if port not in _handed_out:
            _handed_out.add(port)
            return port


def until(check: Callable[[], Any], seconds: float = 60.0, pause: float = 0.02) -> Any:
    """What `check` returns, as soon as it is true."""
    deadline = time.monotonic() + seconds * PATIENCE
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"{check} not true within {seconds} s")
        time.sleep(pause)


class Instance:
    """`settings` are TORPOR_* variables without the prefix."""

    def __init__(self, name: str, first_uid: int, **settings: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"torpor-{name}-", dir="/var/tmp"))
        self.directory.chmod(0o755)
        self.name, self.first_uid = name, first_uid
        self.root, self.run = self.directory / "root", self.directory / "run"
        self.edge_port = free_port()
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "TORPOR_")) or key == "TORPOR_CACHE"
        }  # fmt: skip
        defaults = {
            "ROOT": str(self.root), "RUN": str(self.run), "NAME": name, "EDGE__PORT": str(self.edge_port),
            "API__PORT": str(free_port()), "API__METRICS_PORT": str(free_port()), "OBJECT_STORE__PORT": str(free_port()),
            "USERS__FIRST": str(first_uid), "LIMITS__MIN_IDLE_SECONDS": "1",
            "EGRESS__CLOSED": "true", "STANDBYS__WARM": "0",
        }  # fmt: skip
        self.environment |= {f"TORPOR_{key}": value for key, value in (defaults | everywhere | settings).items()}
        self.process: subprocess.Popen[str] | None = None
        self.log = self.directory / "serve.log"
        self.role, self.bucket = ROLE, BUCKET
        self._key: tuple[str, str] | None = None

    # ---- processes ----

    def start(self, prefix: tuple[str, ...] = (), pass_fds: tuple[int, ...] = ()) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*prefix, str(BIN / "torpor"), "serve"], env=self.environment, stdout=subprocess.PIPE, stderr=log, text=True, cwd="/",
                pass_fds=pass_fds,
            )  # fmt: skip
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("export CURL_CA_BUNDLE"):
                break
        else:
            raise RuntimeError(f"torpor serve ended: {self.log.read_text()[-3000:]}")
        self.environment |= {
            "AWS_CONFIG_FILE": str(self.root / "aws/config"), "AWS_SHARED_CREDENTIALS_FILE": str(self.root / "aws/credentials"),
            "CURL_CA_BUNDLE": str(self.root / "tls/bundle.crt"), "PATH": f"{BIN}:{self.environment['PATH']}",
        }  # fmt: skip
        self._clients: dict[str, Any] = {}

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(120 * PATIENCE)
        self.process = None
        return code

    def pid_of(self, child: str) -> int:
        """A supervised process, by its name; waits for the successor of one that has ended."""

        def serving() -> int:
            state = json.loads((self.run / self.name / "supervisor.json").read_text())
            return next((int(one["pid"]) for one in state["processes"] if one["name"] == child and one["serves"]), 0)

        return int(until(serving))

    def kill(self, child: str) -> None:
        """kill -9, and wait until its successor serves."""
        old = self.pid_of(child)
        os.kill(old, signal.SIGKILL)
        until(lambda: self.pid_of(child) != old)

    def hypervisors(self) -> dict[str, dict[str, Any]]:
        """Hypervisors that hold a session, by session."""
        found = {}
        for path in (self.run / self.name / "vms").glob("*/process.json"):
            try:
                record = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if record["session"]:
                found[record["session"]] = record
        return found

    def inside(self, identifier: str, work: Callable[[], Any]) -> Any:
        """Runs `work` in a microVM's network namespace: the direct way to its application."""
        from vmm.namespaces import inside

        link = self.hypervisors()[identifier]["link"]
        return inside(self.run / self.name / "netns" / link, work)

    def remove(self) -> None:
        """Also what it wrote down of itself in the cache, which would count for thirty days."""
        cache = Path(self.environment.get("TORPOR_CACHE") or Settings().cache)
        roots.need_of(cache, self.root).unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    # ---- clients ----

    def client(self, name: str = "lambda-microvms") -> Any:
        if name not in self._clients:
            key, secret = self._key or next(iter(json.loads((self.root / "control/access-keys.json").read_text()).items()))
            port = self.environment["TORPOR_OBJECT_STORE__PORT" if name == "s3" else "TORPOR_API__PORT"]
            self._clients[name] = boto3.client(  # type: ignore[call-overload]
                name, region_name="us-east-1", endpoint_url=f"http://127.0.0.1:{port}", aws_access_key_id=key,
                aws_secret_access_key=secret, config=Config(retries={"max_attempts": 8, "mode": "standard"}, read_timeout=60 * PATIENCE, parameter_validation=False),
            )  # fmt: skip
        return self._clients[name]

    def other_account(self, name: str) -> Instance:
        """This instance for the administrator of a new account."""
        number = self.command("torpor", "account", "create", name).stdout.strip()
        made = json.loads(self.command("torpor", "key", "create", "admin", "--account", number, "--admin", "--json").stdout)
        other = copy.copy(self)
        other.role, other.bucket, other._key, other._clients = (
            f"arn:aws:iam::{number}:role/test",
            f"{BUCKET}-{name}",
            (made["key"], made["secret"]),
            {},
        )
        return other

    def command(self, *words: str, check: bool = True, deadline: float = 120) -> subprocess.CompletedProcess[str]:
        """A command with the instance's environment: torpor, aws, curl."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=deadline * PATIENCE, check=False, cwd="/"
        )
        if check and done.returncode:
            raise AssertionError(f"{words} exited with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    # ---- images ----

    def upload(self, files: Mapping[str, bytes | str] | bytes, key: str = "app.zip") -> str:
        store = self.client("s3")
        if self.bucket not in [bucket["Name"] for bucket in store.list_buckets()["Buckets"]]:
            store.create_bucket(Bucket=self.bucket)
        store.put_object(Bucket=self.bucket, Key=key, Body=files if isinstance(files, bytes) else make_zip(files))
        return f"s3://{self.bucket}/{key}"

    def create(self, name: str, uri: str, **request: Any) -> str:
        """Starts a build; returns the image's ARN."""
        request.setdefault("resources", [{"minimumMemoryInMiB": 512}])
        made = self.client().create_microvm_image(
            name=name, baseImageArn=BASE, buildRoleArn=self.role, codeArtifact={"uri": uri}, **request
        )
        return str(made["imageArn"])

    def built(self, arn: str, version: str = "1.0", seconds: float = 120) -> dict[str, Any]:
        """Waits for the build's end; returns the build."""
        api = self.client()
        until(lambda: api.get_microvm_image(imageIdentifier=arn)["state"] not in ("CREATING", "UPDATING"), seconds, 0.1)
        builds = api.list_microvm_image_builds(imageIdentifier=arn, imageVersion=version)["items"]
        return dict(api.get_microvm_image_build(imageIdentifier=arn, imageVersion=version, buildId=builds[0]["buildId"]))

    # ---- microVMs ----

    def launch(self, arn: str, **request: Any) -> dict[str, Any]:
        vm = self.client().run_microvm(imageIdentifier=arn, **request)
        self.state(vm["microvmId"], "RUNNING")
        return dict(vm)

    def describe(self, identifier: str) -> dict[str, Any]:
        return dict(self.client().get_microvm(microvmIdentifier=identifier))

    def state(self, identifier: str, *wanted: str, seconds: float = 60.0) -> dict[str, Any]:
        """Waits for one of the states; fails at once when the microVM is terminated instead."""

        def check() -> dict[str, Any] | None:
            vm = self.describe(identifier)
            if vm["state"] == "TERMINATED" and "TERMINATED" not in wanted:
                raise AssertionError(f"{identifier} is TERMINATED: {vm.get('stateReason')}")
            return vm if vm["state"] in wanted else None

        return dict(until(check, seconds))

    def token(self, identifier: str, ports: list[dict[str, Any]] | None = None, minutes: int = 30) -> str:
        answer = self.client().create_microvm_auth_token(
            microvmIdentifier=identifier, expirationInMinutes=minutes, allowedPorts=ports or [{"allPorts": {}}]
        )
        return str(answer["authToken"]["X-aws-proxy-auth"])

    def terminate(self, *identifiers: str) -> None:
        for identifier in identifiers:
            self.client().terminate_microvm(microvmIdentifier=identifier)
        for identifier in identifiers:
            self.state(identifier, "TERMINATED")


@contextlib.contextmanager
def served(one: Instance) -> Iterator[Instance]:
    """Started, then stopped and removed; its log must have no traceback."""
    try:
        one.start()
        yield one
    finally:
        if one.process is not None:
            one.stop()
        log = one.log.read_text()
        one.remove()
    assert "Traceback" not in log, log[log.index("Traceback") :][:4000]


def make_zip(files: Mapping[str, bytes | str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def app_files(**changes: str) -> dict[str, bytes | str]:
    """The test application's files; `changes` replace text in its Dockerfile."""
    files: dict[str, bytes | str] = {path.name: path.read_bytes() for path in (REPO / "tests/app").iterdir() if path.is_file()}
    dockerfile = files["Dockerfile"].decode()  # type: ignore[union-attr]
    for old, new in changes.items():
        dockerfile = dockerfile.replace(old, new)
    return files | {"Dockerfile": dockerfile}
