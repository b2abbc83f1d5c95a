"""run, ps, token, curl, logs, suspend, resume, terminate: the commands for microVMs."""

from __future__ import annotations

import os
import re
import sys
import time
from typing import Annotated, Any

import botocore.exceptions
import typer

from gateway.sessions.logs import default_group, default_stream

from .admin import microvm_log, tiers
from .client import all_microvms, bundle, client, connector_arn, image_arn, resolve, role_arn, session
from .images import find, print_build_log
from .output import fail, line_of, show_json, show_table

_POLL_SECONDS = 0.05
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Id = Annotated[str, typer.Argument(help="The microVM's id, or the beginning of it.")]
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
Port = Annotated[int, typer.Option("--port", "-p", help="The application's port.")]


def register(app: typer.Typer) -> None:
    for command in (run, ps, token, logs, suspend, resume, terminate):
        app.command()(command)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(curl)


def run(
    image: Annotated[str, typer.Argument(help="The image's name or ARN.")],
    version: Annotated[str | None, typer.Option(help="The image's version; the latest active by default.")] = None,
    idle: Annotated[int, typer.Option(help="Suspend after this many seconds without a request; 0: never.")] = 0,
    suspended: Annotated[int, typer.Option(help="Terminate after this many seconds asleep.")] = 28_800,
    auto_resume: Annotated[bool, typer.Option(help="Let a request wake it.")] = True,
    payload: Annotated[str | None, typer.Option(help="What the run hook is given.")] = None,
    shell: Annotated[bool, typer.Option(help="Let `torpor shell` in (SHELL_INGRESS).")] = False,
    wait: Annotated[bool, typer.Option(help="Return when it is RUNNING.")] = True,
    as_json: Json = False,
) -> None:
    """Launch a microVM from an image.

    Example: torpor run flask --idle 60
    """
    request: dict[str, Any] = {"imageIdentifier": image_arn(image), "executionRoleArn": role_arn("torpor-run")}
    if version:
        request["imageVersion"] = version
    if idle:
        request["idlePolicy"] = {
            "maxIdleDurationSeconds": idle, "suspendedDurationSeconds": suspended, "autoResumeEnabled": auto_resume,
        }  # fmt: skip
    if payload is not None:
        request["runHookPayload"] = payload
    if shell:
        request["ingressNetworkConnectors"] = [connector_arn(name) for name in ("HTTP_INGRESS", "SHELL_INGRESS")]
    api = client()
    made = api.run_microvm(**request)
    while wait and made["state"] == "PENDING":
        time.sleep(_POLL_SECONDS)
        made = api.get_microvm(microvmIdentifier=made["microvmId"])
    made.pop("ResponseMetadata")
    if as_json:
        show_json(made)
    else:
        print(made["microvmId"])
    if made["state"] not in ("RUNNING", "PENDING"):
        fail(f"{made['microvmId']} is {made['state']}: {made.get('stateReason')}", 1)


def ps(all_states: Annotated[bool, typer.Option("--all", "-a", help="Terminated ones too.")] = False, as_json: Json = False) -> None:
    """List microVMs.

    Example: torpor ps --all
    """
    api = client()
    found = [item for item in all_microvms() if all_states or item["state"] != "TERMINATED"]
    details = [api.get_microvm(microvmIdentifier=item["microvmId"]) for item in found]
    for detail in details:
        detail.pop("ResponseMetadata")
    if as_json:
        show_json(details)
        return
    where = tiers()
    show_table(
        ("ID", "STATE", "TIER", "IMAGE", "STARTED", "ENDPOINT", "REASON"),
        [
            (
                d["microvmId"], d["state"], where.get(d["microvmId"], ""), f"{d['imageArn'].rpartition(':')[2]} {d['imageVersion']}",
                d["startedAt"].strftime("%F %T"), d["endpoint"], d.get("stateReason") or "",
            )
            for d in details
        ],
    )  # fmt: skip


def allowed_ports(words: list[str]) -> list[dict[str, Any]]:
    """What CreateMicrovmAuthToken takes for them."""
    allowed: list[dict[str, Any]] = []
    for word in words:
        match = _PORTS.fullmatch(word)
        if word == "all":
            allowed.append({"allPorts": {}})
        elif match is None:
            fail(f"{word} is no port: write 8080, 3000-3010 or all", 2)
        elif match[2]:
            allowed.append({"range": {"startPort": int(match[1]), "endPort": int(match[2])}})
        else:
            allowed.append({"port": int(match[1])})
    return allowed


def _mint(identifier: str, ports: list[str], minutes: int) -> dict[str, str]:
    allowed = allowed_ports(ports)
    answer = client().create_microvm_auth_token(microvmIdentifier=identifier, expirationInMinutes=minutes, allowedPorts=allowed)
    return dict(answer["authToken"])


def token(
    microvm: Id,
    port: Annotated[list[str], typer.Option("--port", "-p", help="A port, a range 3000-3010, or all; may be repeated.")] = ["8080"],  # noqa: B006
    minutes: Annotated[int, typer.Option(help="How long it is valid, 1 to 60.")] = 60,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the token.")] = False,
    as_json: Json = False,
) -> None:
    """Mint a token for a microVM's endpoint.

    Example: curl -H "X-aws-proxy-auth: $(torpor token ID -p 5000 -q)" -H "X-aws-proxy-port: 5000" https://...
    """
    parts = _mint(resolve(microvm), port, minutes)
    if as_json:
        show_json(parts)
    elif quiet:
        print(parts["X-aws-proxy-auth"])
    else:
        for name, value in parts.items():
            print(f"{name}: {value}")
        if len(port) == 1 and port[0].isdigit():
            print(f"X-aws-proxy-port: {port[0]}")


def curl(
    context: typer.Context, microvm: Id, path: Annotated[str, typer.Argument(help="The request's path.")] = "/", port: Port = 8080
) -> None:
    """Call a microVM with curl: token, port and certificates are filled in, further options are curl's.

    Example: torpor curl 3f2a / -p 5000 -i
    """
    identifier = resolve(microvm)
    if not path.startswith("/"):
        context.args.insert(0, path)
        path = "/"
    endpoint = client().get_microvm(microvmIdentifier=identifier)["endpoint"]
    parts = _mint(identifier, [str(port)], 5)
    secret = os.memfd_create("headers", 0)  # curl inherits it: what stands in a command is everybody's to read (ps)
    os.write(secret, "".join(f"{name}: {value}\n" for name, value in parts.items()).encode())
    os.lseek(secret, 0, os.SEEK_SET)
    command = [
        "curl",
        "-sS",
        "--cacert",
        bundle(),
        "-H",
        f"@/proc/self/fd/{secret}",
        "-H",
        f"X-aws-proxy-port: {port}",
        *context.args,
        f"https://{endpoint}{path}",
    ]
    os.execvp("curl", command)


def logs(
    microvm: Annotated[str, typer.Argument(help="A microVM's id, or the beginning of it; or an image's name.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    version: Annotated[str | None, typer.Option(help="Of an image: the version; the newest by default.")] = None,
) -> None:
    """Print what a microVM's application wrote, and what the service says about the microVM (lines that begin with "torpor:").

    Of an image it prints the build's log. Example: torpor logs 3f2a -f
    """
    if (image := find(microvm)) is not None:
        print_build_log(image, version, follow)
        return
    api, reader = client(), session().client("logs")
    identifier = resolve(microvm)
    vm = api.get_microvm(microvmIdentifier=identifier)
    own, after = microvm_log(identifier, 0), 0
    why = own.why if own is not None else "" if vm.get("executionRoleArn") else "it has no execution role"
    if why:
        print(f"torpor: what the application of {identifier} writes is not kept: {why}", file=sys.stderr)
    group = (own.group if own is not None else "") or default_group(vm["imageArn"].rpartition(":")[2])
    stream = (own.stream if own is not None else "") or default_stream(vm["imageVersion"], identifier, vm["startedAt"].timestamp())
    arguments: dict[str, str] = {}
    while True:
        try:
            page = reader.get_log_events(logGroupName=group, logStreamName=stream, startFromHead=True, **arguments)
        except botocore.exceptions.ClientError:
            page = {"events": [], "nextForwardToken": arguments.get("nextToken", "f/0")}
        kept = own.lines if own is not None else []
        for text in [event["message"] for event in page["events"]] + [line.text for line in kept]:
            print(line_of(text), flush=True)
        arguments = {"nextToken": page["nextForwardToken"]}
        after = kept[-1].number if kept else after
        if not page["events"]:
            if not follow or api.get_microvm(microvmIdentifier=identifier)["state"] == "TERMINATED":
                return
            time.sleep(0.5)
        own = microvm_log(identifier, after)


def _wait_for(identifier: str, states: tuple[str, ...]) -> None:
    api = client()
    while (vm := api.get_microvm(microvmIdentifier=identifier))["state"] not in states:
        if vm["state"] == "TERMINATED":
            fail(f"{identifier} is TERMINATED: {vm.get('stateReason')}", 1)
        time.sleep(_POLL_SECONDS)


def suspend(microvm: Id) -> None:
    """Suspend a microVM: memory and disk to a snapshot, its process gone.

    Example: torpor suspend 3f2a
    """
    identifier = resolve(microvm)
    client().suspend_microvm(microvmIdentifier=identifier)
    _wait_for(identifier, ("SUSPENDED",))


def resume(microvm: Id) -> None:
    """Resume a suspended microVM.

    Example: torpor resume 3f2a
    """
    identifier = resolve(microvm)
    client().resume_microvm(microvmIdentifier=identifier)
    _wait_for(identifier, ("RUNNING",))


def terminate(microvms: Annotated[list[str], typer.Argument(help="Ids, or the beginnings of them.")]) -> None:
    """Terminate microVMs.

    Example: torpor terminate 3f2a 77b0
    """
    for identifier in [resolve(name) for name in microvms]:
        client().terminate_microvm(microvmIdentifier=identifier)
        _wait_for(identifier, ("TERMINATED",))
