"""The command line as scripts see it: exit codes, one clear line for an error, completion."""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import sqlite3
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from commands import TORPOR, run

from gateway import instance
from gateway.cli import app, host, microvms, output, repair
from gateway.config import ConfigError, Settings
from gateway.messages import EgressLogRequest, LogLine, MicrovmLog
from gateway.sessions import schema
from vmm import network

REPO = Path(__file__).resolve().parents[2]


def test_version() -> None:
    assert subprocess.run([TORPOR, "version"], capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    assert run("version", "--json").stdout.startswith("{")


def test_the_readme_names_every_command() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert [name for name in commands if f"`{name}`" not in text] == []
    for command in commands.values():
        for one in getattr(command, "commands", {"": command}).values():
            assert "Example:" in one.help, one.name


@pytest.mark.parametrize(
    ("words", "variables", "code", "text"),
    [
        (("ps",), {"TORPOR_ROOT": "/nonexistent"}, 1, "torpor: no instance at /nonexistent: start one with `torpor serve`"),
        (("env",), {"TORPOR_ROOT": "/nonexistent"}, 1, "torpor: no instance at /nonexistent: start one with `torpor serve`"),
        (("env",), {"TORPOR_EDGE__WORKERS": "x"}, 1, "torpor: edge.workers: Input should be a valid integer"),
        (("env",), {"TORPOR_NAME": "Not A Name"}, 1, "torpor: name: String should match pattern"),
    ],
)
def test_errors_are_one_line(words: tuple[str, ...], variables: dict[str, str], code: int, text: str) -> None:
    done = run(*words, **variables)
    assert done.returncode == code and done.stderr.startswith(text) and done.stderr.count("\n") == 1 and not done.stdout


def test_env_has_the_certificates_of_every_family_of_clients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "aws").mkdir()
    instance.write_aws_profile(Settings(root=tmp_path), "key", "secret")
    host.env(tmp_path, None)
    lines = capsys.readouterr().out.split()
    for name in (
        "CURL_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
    ):  # fmt: skip
        assert f"{name}={tmp_path}/tls/bundle.crt" in lines


@pytest.mark.parametrize("remove", [False, True])
def test_trust_says_what_to_do_for_browsers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], remove: bool
) -> None:
    from gateway.cli import host

    (tmp_path / "tls").mkdir()
    (tmp_path / "tls/ca.crt").write_text("ours")
    monkeypatch.setattr(host, "_SYSTEM_AUTHORITIES", tmp_path / "system")
    monkeypatch.setattr(host.subprocess, "run", lambda *words, **rest: subprocess.CompletedProcess(words, 0, "", ""))
    monkeypatch.setattr(host.os, "geteuid", lambda: 0)
    (tmp_path / "system").mkdir()
    if remove:
        with pytest.raises(SystemExit):
            host.trust(tmp_path, "mine", remove)
        assert "is not there" in capsys.readouterr().err
        (tmp_path / "system/torpor-mine.crt").touch()
    host.trust(tmp_path, "mine", remove)
    said = capsys.readouterr().err
    expected = (
        "certutil -D -d sql:$HOME/.pki/nssdb -n torpor-mine\n"
        if remove
        else f"certutil -A -d sql:$HOME/.pki/nssdb -t C,, -n torpor-mine -i {tmp_path}/tls/ca.crt\n"
    )
    assert expected in said and "Firefox" in said and (tmp_path / "system/torpor-mine.crt").exists() is not remove


def test_an_error_keeps_its_square_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    """As the patterns of the API's validation have them, and IPv6 addresses."""
    text = "Member must satisfy regular expression pattern: [a-zA-Z0-9-_]+ at [::1]:4700 [/] [red]x[/red]"
    with pytest.raises(SystemExit):
        output.fail(text)
    output.show_table(("[A]",), [("[::1]",)])
    done = capsys.readouterr()
    assert done.err == f"torpor: {text}\n" and "[::1]" in done.out and "[A]" in done.out


@pytest.mark.parametrize("there", [True, False])
def test_doctor_before_there_is_an_instance(tmp_path: Path, there: bool) -> None:
    """On a directory that is bare, or not there: which accelerator, and why not the better one; and nothing is made."""
    root = tmp_path / "bare/root"
    if there:
        root.mkdir(parents=True)
    done = run(
        "doctor", "--json", TORPOR_ROOT=str(root), TORPOR_CACHE=str(tmp_path / "cache"), TORPOR_NAME="bare", TORPOR_RUN=str(tmp_path)
    )
    assert done.returncode == 1 and not done.stderr
    rows = {row["check"]: (row["ok"], row["text"]) for row in json.loads(done.stdout)}
    assert rows["acceleration"][0] and rows["acceleration"][1].startswith("tcg: software emulation, not KVM: ")
    assert rows["acceleration"][1].rpartition(": ")[2] in (
        "/dev/kvm is not there",
        f"it can be probed once `torpor assets` has made {tmp_path}/cache/qemu-root",
    )
    assert rows["hypervisor"] == (True, "qemu: not Firecracker: it needs KVM")
    assert rows["host: kvm"][0] and rows["host: kvm"][1].startswith("/dev/kvm ")
    assert rows["asset kernel"][0] is False and "torpor assets" in rows["asset kernel"][1]
    assert rows["disk"][1].endswith(f"free below {root if there else tmp_path}")
    assert sorted(path for path in tmp_path.rglob("*")) == ([root.parent, root] if there else [])
    wanted = run(
        "doctor", "--json", TORPOR_ROOT=str(root), TORPOR_CACHE=str(tmp_path / "cache"), TORPOR_NAME="bare", TORPOR_ACCELERATOR="kvm"
    )
    checks = {row["check"]: row for row in json.loads(wanted.stdout)}
    assert not checks["acceleration"]["ok"] and checks["acceleration"]["text"].startswith("kvm: chosen by the settings, but ")
    assert not checks["host: kvm"]["ok"]


def test_doctor_goes_on_where_the_kept_port_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody listens, it said that another process did."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        for content, expected in (("", "chosen at the next start"), ("4\xff", "chosen at the next start"), (str(port), f"{port}, free")):
            (tmp_path / "edge-port").write_text(content, encoding="latin-1")
            assert host.edge_port(tmp_path / "edge-port") == ("edge port", True, expected)
        sock.listen()
        assert host.edge_port(tmp_path / "edge-port")[2].startswith(f"{port}, held by ")


def test_doctor_names_what_the_store_cannot_read_and_takes_nothing_of_it_for_left_over(tmp_path: Path) -> None:
    settings = Settings(root=tmp_path, run=tmp_path / "run", name="bare")
    for path in (settings.control_dir, settings.sessions_dir / "torn", settings.sessions_dir / "nobodys", settings.images_dir / "key-1.0"):
        path.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(settings.control_dir / "torpor.db", isolation_level=None)) as connection:
        schema.migrate(connection, settings.control_dir / "torpor.db")
        connection.execute("INSERT INTO sessions VALUES ('torn', 'SUSPENDED', x'c1')")
        connection.execute("INSERT INTO set_aside VALUES ('images', 'arn', 1.0, 'older', x'c1')")
        store = repair.known(settings.control_dir / "torpor.db")
        assert [(row.kind, row.key) for row in store.set_aside] == [("images", "arn"), ("sessions", "torn")]
        found = [one.what for one in repair.leftovers_of(settings, store) if one.kind == "directory"]
        assert found == [str(settings.sessions_dir / "nobodys")]
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="newer version"):
        repair.known(settings.control_dir / "torpor.db")
    (settings.control_dir / "torpor.db").write_bytes(b"nonsense" * 1000)
    done = run(
        "doctor", "--json", TORPOR_ROOT=str(tmp_path), TORPOR_CACHE=str(tmp_path / "c"), TORPOR_NAME="bare", TORPOR_RUN=str(settings.run)
    )
    rows = {row["check"]: (row["ok"], row["text"]) for row in json.loads(done.stdout)}
    assert not rows["store"][0] and "file is not a database" in rows["store"][1] and not any("left over" in check for check in rows)


def test_ports_of_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = [{"port": 80}, {"range": {"startPort": 3000, "endPort": 3010}}, {"allPorts": {}}]
    assert microvms.allowed_ports(["80", "3000-3010", "all"]) == wanted
    for word in ("x", "1_0", "80-", "-80", "+80", "80-81-82", "", "\u0663"):
        with pytest.raises(SystemExit) as ended:
            microvms.allowed_ports([word])
        assert ended.value.code == 2 and "is no port: write 8080, 3000-3010 or all" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("token",), ("nonsense",), ("run", "--nonsense")])
def test_wrong_use_is_two(words: tuple[str, ...]) -> None:
    assert run(*words).returncode == 2


@pytest.mark.parametrize(("typed", "offered"), [("torpor su", "suspend"), ("torpor tok", "token"), ("torpor run --im", "")])
def test_completion(typed: str, offered: str) -> None:
    done = run(_TORPOR_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(typed.count(" ")))
    assert offered in done.stdout.split() or not offered


def test_every_command_has_an_example() -> None:
    from gateway.cli import app

    def commands(group: typer.Typer, path: str) -> list[tuple[str, str]]:
        own = [
            (f"{path} {one.name or one.callback.__name__}", one.callback.__doc__ or "") for one in group.registered_commands if one.callback
        ]
        return own + [
            pair for one in group.registered_groups if one.typer_instance for pair in commands(one.typer_instance, f"{path} {one.name}")
        ]

    found = commands(app, "torpor")
    assert len(found) > 25
    for name, text in found:
        assert name in text.partition("Example: ")[2], name


class Logs:
    """A log store whose stream has one page."""

    def __init__(self, *lines: str) -> None:
        self.lines = lines

    def get_log_events(self, **call: object) -> dict[str, object]:
        events = [] if "nextToken" in call else [{"message": line} for line in self.lines]
        return {"events": events, "nextForwardToken": "f/1"}


@pytest.mark.parametrize(
    ("why", "printed", "said"),
    [
        ("", "hello\ntorpor: port 80: nothing listens\n", ""),
        (
            "it has no execution role",
            "hello\ntorpor: port 80: nothing listens\n",
            "torpor: what the application of vm-1 writes is not kept: it has no",
        ),
    ],
)
def test_logs_show_the_services_own_lines_and_say_why_the_applications_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: str, printed: str, said: str
) -> None:
    from gateway.cli import microvms

    lines = [LogLine(7, 0, "torpor: port 80: nothing listens")]
    vm = {"imageArn": "arn:x:app", "imageVersion": "1.0", "startedAt": datetime.datetime.now(tz=datetime.UTC), "state": "RUNNING"}
    monkeypatch.setattr(microvms, "client", lambda: SimpleNamespace(get_microvm=lambda microvmIdentifier: vm))
    monkeypatch.setattr(microvms, "session", lambda: SimpleNamespace(client=lambda name: Logs("hello")))
    monkeypatch.setattr(microvms, "resolve", lambda text: "vm-1")
    monkeypatch.setattr(microvms, "find", lambda text: None)
    monkeypatch.setattr(
        microvms, "microvm_log", lambda identifier, after: MicrovmLog("", "", why, [line for line in lines if line.number > after])
    )
    microvms.logs("vm", follow=False)
    done = capsys.readouterr()
    assert done.out == printed and done.err.startswith(said) and bool(done.err) is bool(why)


def test_logs_of_an_images_name_are_its_builds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest version's by default, until the build is over with --follow; an older version's by its number."""
    from gateway.cli import images, microvms

    states = ["IN_PROGRESS", "IN_PROGRESS", "SUCCESSFUL"]
    asked: list[str] = []

    class Written(Logs):
        def get_log_events(self, **call: object) -> dict[str, object]:
            asked.append(f"{call['logGroupName']} {call['logStreamName']}")
            return super().get_log_events(**call)

    versions = [{"imageVersion": "2.0"}, {"imageVersion": "1.0", "logging": {"cloudWatch": {"logGroup": "/own"}}}]
    api = SimpleNamespace(
        get_microvm_image=lambda imageIdentifier: {"imageArn": imageIdentifier, "name": "hello"},
        get_paginator=lambda name: SimpleNamespace(paginate=lambda imageIdentifier: [{"items": versions}]),
        list_microvm_image_builds=lambda **of: {"items": [{"buildId": "b"}]},
        get_microvm_image_build=lambda **of: {"buildState": states.pop(0) if states else "SUCCESSFUL"},
    )
    monkeypatch.setattr(images, "client", lambda: api)
    monkeypatch.setattr(images, "image_arn", lambda name: f"arn:x:{name}")
    monkeypatch.setattr(images, "session", lambda: SimpleNamespace(client=lambda name: Written("STEP 1")))
    monkeypatch.setattr(images, "_POLL_SECONDS", 0)
    microvms.logs("hello", follow=True, version=None)
    assert capsys.readouterr().out == "STEP 1\n" and states == []
    assert set(asked) == {"/aws/lambda-microvms/hello build/2.0/b"}
    microvms.logs("hello", follow=False, version="1.0")
    assert asked[-1] == "/own build/1.0/b" and capsys.readouterr().out == "STEP 1\n"
    with pytest.raises(SystemExit):
        microvms.logs("hello", follow=False, version="3.0")
    assert "hello has no version 3.0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "gateway", "gateway/__init__.py"])
def test_code_that_the_services_users_may_not_read_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    """As a clone is that was made under a umask of 077."""
    (tmp_path / "gateway").mkdir()
    (tmp_path / "gateway/__init__.py").touch()
    for path in (tmp_path, tmp_path / "gateway"):
        path.chmod(0o755)
    instance.check_readable(tmp_path / "gateway")
    (tmp_path / name).chmod(0o700)
    with pytest.raises(ConfigError, match=f"chmod -R go.rX {tmp_path}$"):
        instance.check_readable(tmp_path / "gateway")


def test_a_service_may_have_more_descriptors_than_a_login() -> None:
    """As many as it may: the second limit too, where CAP_SYS_RESOURCE lets it be raised."""
    limits = [(256, 256), (256, 512), (384, 512)]
    program = (
        "import os, resource, sys; from gateway.observe import room\n"
        f"for limits in {limits}:\n"
        "    if child := os.fork():\n"
        "        os.waitpid(child, 0)\n"
        "    else:\n"
        "        resource.setrlimit(resource.RLIMIT_NOFILE, limits)\n"
        "        room.allow_descriptors(); print(*resource.getrlimit(resource.RLIMIT_NOFILE)); sys.exit()"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said in ([f"{hard} {hard}" for _, hard in limits], ["524288 524288"] * 3)


def test_doctor_counts_the_links_in_which_firecrackers_standbys_wait() -> None:
    """Each of 48 has a namespace, eight sockets in it, services and a tap: some 600 descriptors that QEMU's do not have."""
    kept = Settings().standbys
    more = host.kept_ready(kept, "firecracker") - host.kept_ready(kept, "qemu")
    assert more == kept.most_per_image * network.LINK_DESCRIPTORS


def test_a_packages_own_script_runs_where_the_path_has_a_space(tmp_path: Path) -> None:
    directory = tmp_path / "a place"
    venv.create(directory, with_pip=False)
    script = directory / "bin/aws"
    script.write_text(f"#!{directory}/bin/python3\nimport sys; print(sys.prefix, sys.argv[1:])\n")
    script.chmod(0o755)
    for _ in range(2):  # and a second time changes nothing
        subprocess.run([directory / "bin/python", REPO / "config/scripts.py"], check=True)
        said = subprocess.run([script, "one", "two three"], capture_output=True, text=True, check=True).stdout
        assert said == f"{directory} ['one', 'two three']\n"


def test_the_egress_audit_is_a_line_a_decision(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Names are a guest's words: they are shown, and not obeyed."""
    from gateway.cli import admin

    first = {
        "time": "T1",
        "order": 5,
        "what": "name",
        "name": "evil\x1b]0;x\x07",
        "address": "",
        "verdict": "refused",
        "reason": "no group",
        "untold": 0,
    }
    ended = {
        "what": "connection",
        "name": "a.example",
        "address": "203.0.113.5",
        "port": 443,
        "verdict": "ended",
        "reason": "",
        "sent": 1,
        "received": 2,
    }
    kept = [first, {"time": "T2", "order": 6, **ended, "untold": 3}]
    asked: list[int] = []

    def ask(method: str, body: EgressLogRequest, kind: object) -> list[str]:
        assert (method, body.session) == ("egress_log", "vm-1")
        asked.append(body.after)
        return [json.dumps(line) for line in kept if int(str(line["order"])) > body.after][:1]

    states = iter(["RUNNING", "TERMINATED"])
    monkeypatch.setattr(admin, "ask", ask)
    monkeypatch.setattr(admin, "resolve", lambda name: "vm-1")
    monkeypatch.setattr(admin, "_FOLLOW_SECONDS", 0)
    monkeypatch.setattr(admin, "client", lambda: SimpleNamespace(get_microvm=lambda microvmIdentifier: {"state": next(states)}))
    admin.egress("vm", follow=True)
    assert capsys.readouterr().out == (
        "T1 refused name evil^[]0;x^G - (no group)\n"
        "T2 ended connection a.example 203.0.113.5:443 sent 1 received 2 [3 lines before this one were not kept]\n"
    )
    assert asked == [0, 5, 6, 6]
    admin.egress("vm", as_json=True)
    assert [json.loads(line)["order"] for line in capsys.readouterr().out.splitlines()] == [5, 6]
