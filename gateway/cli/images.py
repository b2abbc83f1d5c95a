"""build, images, rmi: the commands for images."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Annotated, Any

import botocore.exceptions
import typer

from gateway.config import ConfigError
from gateway.sessions.logs import build_stream, default_group

from . import context
from .client import all_images, client, image_arn, role_arn, session, settings
from .output import console, errors, fail, line_of, mib, show_json, show_table

_BUCKET = "torpor-artifacts"
_POLL_SECONDS = 0.3
_REQUEST = (
    "baseImageArn", "baseImageVersion", "buildRoleArn", "description", "codeArtifact", "logging", "egressNetworkConnectors",
    "cpuConfigurations", "resources", "additionalOsCapabilities", "hooks", "environmentVariables",
)  # fmt: skip
_LAST_LINES = 30  # of a build that failed: the step's words, its place in the Dockerfile and the error
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Image = Annotated[str, typer.Argument(help="Name or ARN.")]
Version = Annotated[str, typer.Argument(help="The version, as 1.0.")]


def register(app: typer.Typer) -> None:
    app.command()(build)
    app.command()(images)
    app.command()(rmi)
    app.command()(versions)
    app.command()(activate)
    app.command()(deactivate)


def packed(source: Path) -> IO[bytes]:
    """Returns a directory as a zip file, or a zip file as it is."""
    if source.is_file():
        return source.open("rb")
    out = tempfile.TemporaryFile()  # noqa: SIM115 (the caller's to close)
    try:
        left = context.pack(source, out)
    except context.ContextError as error:
        fail(str(error), 2)
    if left:
        errors.print(f"torpor: left out, being neither files, folders nor links: {', '.join(left)}", soft_wrap=True)
    out.seek(0)
    return out


def build(
    source: Annotated[Path, typer.Argument(exists=True, help="A directory with a Dockerfile, or a zip of one.")],
    name: Annotated[str | None, typer.Option("--name", "-n", help="The image's name; the directory's by default.")] = None,
    memory: Annotated[int, typer.Option("--memory", "-m", help="Minimum memory in MiB: 512, 1024, 2048, 4096 or 8192.")] = 2048,
    as_json: Json = False,
) -> None:
    """Build an image: upload, create or update, follow the log until it is ready.

    Example: torpor build config/examples/flask --name flask --memory 512
    """
    name = name or (source.resolve().name if source.is_dir() else source.stem)
    store, api = session().client("s3"), client()
    try:
        store.head_bucket(Bucket=_BUCKET)
    except botocore.exceptions.ClientError:
        store.create_bucket(Bucket=_BUCKET)
    key = f"{name}/{int(time.time() * 1000)}.zip"
    with packed(source) as body:
        store.put_object(Bucket=_BUCKET, Key=key, Body=body)
    base = f"arn:aws:lambda:{session().region_name}:aws:microvm-image:al2023-1"
    request = {
        "baseImageArn": base, "buildRoleArn": role_arn("torpor-build"), "codeArtifact": {"uri": f"s3://{_BUCKET}/{key}"},
        "resources": [{"minimumMemoryInMiB": memory}],
    }  # fmt: skip
    known = {image["name"]: image for image in all_images()}
    if name in known:
        made = api.update_microvm_image(imageIdentifier=known[name]["imageArn"], **request)
    else:
        made = api.create_microvm_image(name=name, **request)
    result = follow(api, name, made["imageArn"], made["imageVersion"], quiet=as_json)
    if as_json:
        show_json(result)
    if result["buildState"] != "SUCCESSFUL":
        if as_json:  # the log was not shown
            _print_last(name, made["imageVersion"], result["buildId"])
        fail(f"the build failed: {result.get('stateReason')}", 1)


def follow(api: Any, name: str, arn: str, version: str, quiet: bool) -> dict[str, Any]:
    """Prints the build's log as it comes; returns the build when it is over."""
    builds = api.list_microvm_image_builds(imageIdentifier=arn, imageVersion=version)["items"]
    identifier, started = builds[0]["buildId"], time.monotonic()
    logs, token = session().client("logs"), None
    with errors.status("building", spinner="dots") as status:
        while True:
            state = api.get_microvm_image_build(imageIdentifier=arn, imageVersion=version, buildId=identifier)
            image = api.get_microvm_image(imageIdentifier=arn)
            token = _print_new(logs, name, version, identifier, token, quiet)
            status.update(f"building {name} {version}: {time.monotonic() - started:.0f} s")
            if state["buildState"] in ("SUCCESSFUL", "FAILED") and image["state"] not in ("CREATING", "UPDATING"):
                break
            time.sleep(_POLL_SECONDS)
    _print_new(logs, name, version, identifier, token, quiet)
    if not quiet and state["buildState"] == "SUCCESSFUL":
        sizes = state.get("snapshotBuild") or {}
        console.print(
            f"built {arn} version {version} in {time.monotonic() - started:.1f} s: memory {mib(sizes.get('memorySnapshotSizeInBytes'))}, "
            f"code {mib(sizes.get('codeInstallSizeInBytes'))}, disk {mib(sizes.get('diskSnapshotSizeInBytes'))}",
            soft_wrap=True,
        )
    return dict(state, **{"ResponseMetadata": None})


def find(text: str) -> dict[str, Any] | None:
    """Returns the image of a name or an ARN; None where the text is neither's."""
    if text.startswith("microvm-"):
        return None
    try:
        return dict(client().get_microvm_image(imageIdentifier=image_arn(text)))
    except botocore.exceptions.ClientError:
        return None


def print_build_log(image: dict[str, Any], number: str | None, follow: bool) -> None:
    """Prints the log of a version's build, the newest version's by default; with `follow` until the build is over."""
    api, logs, token = client(), session().client("logs"), None
    pages = api.get_paginator("list_microvm_image_versions").paginate(imageIdentifier=image["imageArn"])
    version = next((item for page in pages for item in page["items"] if number in (None, item["imageVersion"])), None)
    if version is None:
        fail(f"{image['name']} has no version {number or ''}: see torpor versions {image['name']}", 3)
    of = {"imageIdentifier": image["imageArn"], "imageVersion": version["imageVersion"]}
    group = ((version.get("logging") or {}).get("cloudWatch") or {}).get("logGroup")
    (build,) = api.list_microvm_image_builds(**of)["items"]
    is_over = False
    while not is_over:
        state = api.get_microvm_image_build(**of, buildId=build["buildId"])["buildState"]
        is_over = not follow or state in ("SUCCESSFUL", "FAILED")
        before, token = token, _print_new(logs, image["name"], of["imageVersion"], build["buildId"], token, False, group)
        if not is_over and before == token:
            time.sleep(_POLL_SECONDS)


def _print_new(
    logs: Any, name: str, version: str, build_id: str, token: str | None, quiet: bool, group: str | None = None
) -> str | None:  # fmt: skip
    """Prints what came since `token`, answer by answer; returns the next one."""
    while True:
        arguments = {"nextToken": token} if token else {}
        try:
            page = logs.get_log_events(
                logGroupName=group or default_group(name), logStreamName=build_stream(version, build_id), startFromHead=True, **arguments
            )
        except botocore.exceptions.ClientError:
            return token
        if not quiet:
            for event in page["events"]:
                print(line_of(event["message"]), flush=True)
        before, token = token, str(page["nextForwardToken"])
        if token == before or not page["events"]:
            return token


def _print_last(name: str, version: str, build_id: str) -> None:
    """The end of a build's log, on standard error."""
    of = {"logGroupName": default_group(name), "logStreamName": build_stream(version, build_id)}
    for event in session().client("logs").get_log_events(**of, startFromHead=False, limit=_LAST_LINES)["events"]:
        print(line_of(event["message"]), file=sys.stderr, flush=True)


def images(
    as_json: Json = False,
    rebuild_old: Annotated[
        bool, typer.Option("--rebuild-old", help="Build new versions of those that an older hypervisor, kernel or agent was made by.")
    ] = False,
) -> None:
    """List the images, or build anew those that an update of the host has left behind.

    Example: torpor images --rebuild-old
    """
    if rebuild_old:
        _rebuild_old()
        return
    found = all_images()
    if as_json:
        show_json(found)
        return
    show_table(
        ("NAME", "STATE", "ACTIVE", "CREATED", "ARN"),
        [(i["name"], i["state"], i.get("latestActiveImageVersion"), i["createdAt"].strftime("%F %T"), i["imageArn"]) for i in found],
    )


def _rebuild_old() -> None:
    """Makes a new version of each from the request that made the last one, its artifact included. Microvms of the older versions go on."""
    from vmm.errors import VmmError

    from .repair import old_versions

    try:
        old = old_versions(settings())
    except (ConfigError, OSError, VmmError) as error:
        fail(f"images cannot be looked at, which needs root on the service's host: {error}", 1)
    api, failed = client(), []
    for image in all_images():
        arn, name = image["imageArn"], image["name"]
        if arn not in old:
            continue
        version, why = old[arn]
        errors.print(f"torpor: {name} {version}: {why}", soft_wrap=True)
        pages = api.get_paginator("list_microvm_image_versions").paginate(imageIdentifier=arn)
        made = next(item for page in pages for item in page["items"] if item["imageVersion"] == version)
        request = {key: made[key] for key in _REQUEST if made.get(key) is not None}
        if "baseImageVersion" in request:
            request["baseImageVersion"] = request["baseImageVersion"].partition(".")[0]  # it answers 1.0 and takes 1
        try:
            new = api.update_microvm_image(imageIdentifier=arn, **request)
        except botocore.exceptions.ClientError as error:  # it is being built, for one: the others are none the worse for it
            failed.append(name)
            errors.print(f"torpor: {name} {version} stays: {error.response['Error'].get('Message')}", soft_wrap=True)
            continue
        result = follow(api, name, arn, new["imageVersion"], quiet=True)
        if result["buildState"] == "SUCCESSFUL":
            console.print(f"{name} {new['imageVersion']} is built: new microVMs are launched from it", soft_wrap=True)
        else:
            failed.append(name)
            errors.print(f"torpor: {name} {version} stays: the build failed: {result.get('stateReason')}", soft_wrap=True)
    if failed:
        fail(f"not built: {', '.join(failed)}; `torpor logs IMAGE` says more, and `torpor build` takes another artifact", 1)


def rmi(
    image: Image, version: Annotated[str | None, typer.Option(help="Only this version, which is not the last.")] = None
) -> None:  # fmt: skip
    """Delete an image with all its versions, or one of them.

    Example: torpor rmi flask --version 1.0
    """
    if version is None:
        client().delete_microvm_image(imageIdentifier=image_arn(image))
    else:
        client().delete_microvm_image_version(imageIdentifier=image_arn(image), imageVersion=version)


def versions(image: Image, as_json: Json = False) -> None:
    """List an image's versions, newest first.

    Example: torpor versions flask
    """
    pages = client().get_paginator("list_microvm_image_versions").paginate(imageIdentifier=image_arn(image))
    found = [item for page in pages for item in page["items"]]
    if as_json:
        show_json(found)
        return
    rows = [(v["imageVersion"], v["state"], v["status"], v["createdAt"].strftime("%F %T"), v["codeArtifact"]["uri"]) for v in found]
    show_table(("VERSION", "STATE", "STATUS", "CREATED", "ARTIFACT"), rows)


def activate(image: Image, version: Version) -> None:
    """Let new microVMs be launched from a version.

    Example: torpor activate flask 2.0
    """
    client().update_microvm_image_version(imageIdentifier=image_arn(image), imageVersion=version, status="ACTIVE")


def deactivate(image: Image, version: Version) -> None:
    """Launch no new microVMs from a version; those that run go on.

    Example: torpor deactivate flask 2.0
    """
    client().update_microvm_image_version(imageIdentifier=image_arn(image), imageVersion=version, status="INACTIVE")
