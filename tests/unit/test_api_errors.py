"""What calls on microVMs, images and tags refuse, and in which words, row by row, over HTTP (service reference, 1.4, 4)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from api_rig import (
    ACCOUNT,
    BASE,
    DETAILS,
    IMAGES,
    OTHER,
    PLAIN,
    REGION,
    ROLE,
    VMS,
    ApiRig,
    connector,
    create,
    encoded,
    image_arn,
    refused,
    run,
    with_images,
)
from botocore.exceptions import ClientError
from rows import row


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiRig]:
    with with_images(tmp_path_factory.mktemp("api")) as one:
        yield one


@row("GetMicrovm", "unknown: 404 `MicroVM not found: <id>` with null details; so for every call on a microVM", "R")
@pytest.mark.parametrize(
    ("method", "tail", "body"),
    [("GET", "", None), ("DELETE", "", None), ("POST", "/suspend", None), ("POST", "/resume", None),
     ("POST", "/auth-token", {"expirationInMinutes": 1, "allowedPorts": [{"port": 1}]}), ("POST", "/shell-auth-token", {"expirationInMinutes": 1})],
)  # fmt: skip
def test_unknown_vm(api: ApiRig, method: str, tail: str, body: Any) -> None:
    answer = api.call(method, f"{VMS}/microvm-no{tail}", body)
    refused(answer, 404, "ResourceNotFoundException", "MicroVM not found: microvm-no", **DETAILS)


@row("GetMicrovmImage", "unknown: 404 `MicroVMImage not found for MicroVMImageID: <arn>`", "R")
@pytest.mark.parametrize(("method", "tail"), [("GET", ""), ("DELETE", "")])
def test_unknown_image(api: ApiRig, method: str, tail: str) -> None:
    arn = image_arn("none")
    answer = api.call(method, f"{IMAGES}/{encoded(arn)}{tail}")
    refused(answer, 404, "ResourceNotFoundException", f"MicroVMImage not found for MicroVMImageID: {arn}", **DETAILS)


@row("GetMicrovmImageVersion", "unknown: 404 `MicroVMImage not found for MicroVMImage: <arn>, Version: <v>`", "R")
@pytest.mark.parametrize(
    ("method", "tail", "body"), [("GET", "", None), ("DELETE", "", None), ("PATCH", "", {"status": "INACTIVE"}), ("GET", "/builds", None)]
)
def test_unknown_version(api: ApiRig, method: str, tail: str, body: Any) -> None:
    answer = api.call(method, f"{IMAGES}/{encoded(PLAIN)}/versions/9.0{tail}", body)
    refused(answer, 404, "ResourceNotFoundException", f"MicroVMImage not found for MicroVMImage: {PLAIN}, Version: 9.0", **DETAILS)


@row("RunMicrovm", "image missing, not built or INACTIVE: 404 `No active version found for MicroVM image <arn>[ and version <v>]`", "R")
def test_no_active_version(api: ApiRig) -> None:
    none = image_arn("none")
    refused(run(api, none), 404, "ResourceNotFoundException", f"No active version found for MicroVM image {none}", **DETAILS)
    answer = run(api, PLAIN, imageVersion="9.0")
    refused(answer, 404, "ResourceNotFoundException", f"No active version found for MicroVM image {PLAIN} and version 9.0", **DETAILS)
    arn = api.image("inactive")
    assert api.call("PATCH", f"{IMAGES}/{encoded(arn)}/versions/1.0", {"status": "INACTIVE"})[2]["status"] == "INACTIVE"
    assert run(api, arn)[2]["message"] == f"No active version found for MicroVM image {arn}"
    api.call("PATCH", f"{IMAGES}/{encoded(arn)}/versions/1.0", {"status": "ACTIVE"})
    assert run(api, arn)[0] == 200


@row("SuspendMicrovm", "TERMINATED: 400 `The MicroVM <id> has been terminated and its state cannot be changed.`", "R")
@row("ResumeMicrovm", "TERMINATED: the same 400", "ours")
def test_terminated(api: ApiRig) -> None:
    one = api.run(PLAIN)
    assert api.call("DELETE", f"{VMS}/{one}")[::2] == (200, {})
    api.reach(one, "TERMINATED")
    for call in ("suspend", "resume"):
        answer = api.call("POST", f"{VMS}/{one}/{call}")
        refused(answer, 400, "ValidationException", f"The MicroVM {one} has been terminated and its state cannot be changed.")
    assert api.call("DELETE", f"{VMS}/{one}")[::2] == (200, {})
    assert api.call("GET", f"{VMS}/{one}")[2]["stateReason"] == "Success."


@row("every operation", "constraints: 400, all of them in one text, `N validation error(s) detected: …`", "R")
def test_constraints(api: ApiRig) -> None:
    status, kind, body = run(api, "a" * 257, runHookPayload="x" * 4097, maximumDurationInSeconds=0)
    assert (status, kind) == (400, "ValidationException")
    assert body["message"].startswith("3 validation errors detected: Value '") and body["message"].count("; ") == 2
    assert "at 'runHookPayload' failed to satisfy constraint: Member must have length less than or equal to 4096" in body["message"]
    body = api.call("POST", VMS, {})[2]
    assert (
        body["message"]
        == "1 validation error detected: Value null at 'imageIdentifier' failed to satisfy constraint: Member must not be null"
    )
    body = create(api, "a b")[2]
    assert body["message"].startswith(
        "1 validation error detected: Value 'a b' at 'name' failed to satisfy constraint: Member must satisfy regular"
    )


@row("RunMicrovm", "a bare name: 400 `Malformed ARN - doesn't start with 'arn:'`", "R")
def test_bare_name_at_run(api: ApiRig) -> None:
    refused(run(api, "plain"), 400, "ValidationException", "Malformed ARN - doesn't start with 'arn:'")


@row("GetMicrovmImage", "a bare name: 400 `Invalid ARN format: <name>`", "R")
def test_bare_name_at_get(api: ApiRig) -> None:
    refused(api.call("GET", f"{IMAGES}/plain"), 400, "ValidationException", "Invalid ARN format: plain")


@row("GetMicrovmImage", "the slash spelling of an ARN: 403 AccessDeniedException", "M")
def test_slash_spelling(api: ApiRig) -> None:
    arn = f"arn:aws:lambda:{REGION}:{ACCOUNT}:microvm-image/plain"
    assert api.call("GET", f"{IMAGES}/{encoded(arn)}")[:2] == (403, "AccessDeniedException")


@row("every operation", "an unencoded `/` in an identifier, and an unknown path: 404 with the gateway's HTML", "R")
def test_gateways_404(api: ApiRig) -> None:
    for path in (f"{IMAGES}/arn:aws:lambda:{REGION}:{ACCOUNT}:microvm-image/plain", "/2025-09-09/nothing", "/"):
        status, headers, body = api.raw("GET", path)
        assert (status, headers["content-type"].partition(";")[0]) == (404, "text/html") and b"<h1>404 Not Found</h1>" in body


@row("GetMicrovmImage", "colons of an ARN may be encoded or not", "R")
def test_colons(api: ApiRig) -> None:
    assert api.call("GET", f"{IMAGES}/{PLAIN}")[2] == api.call("GET", f"{IMAGES}/{encoded(PLAIN)}")[2]


@row("CreateMicrovmAuthToken", "more than 60 minutes: 400 `ExpirationMinutes 61 exceeded max allowed of 60.`", "M")
def test_long_token(api: ApiRig) -> None:
    one = api.run(PLAIN)
    answer = api.call("POST", f"{VMS}/{one}/auth-token", {"expirationInMinutes": 61, "allowedPorts": [{"port": 1}]})
    refused(answer, 400, "ValidationException", "ExpirationMinutes 61 exceeded max allowed of 60.")


@row("CreateMicrovmAuthToken", '`allPorts` as a boolean: 400 `{"Message":"Expected null"}`', "R")
def test_all_ports_as_boolean(api: ApiRig) -> None:
    status, _, body = api.raw("POST", f"{VMS}/microvm-x/auth-token", {"expirationInMinutes": 1, "allowedPorts": [{"allPorts": True}]})
    assert (status, body) == (400, b'{"Message":"Expected null"}')


@row("CreateMicrovmShellAuthToken", "without SHELL_INGRESS, or with ALL_INGRESS beside another: 400 in the recorded words", "R")
def test_shell_tokens(api: ApiRig) -> None:
    def shell(*names: str) -> tuple[int, str, dict[str, Any]]:
        one = api.run(PLAIN, ingressNetworkConnectors=[connector(name) for name in names])
        return api.call("POST", f"{VMS}/{one}/shell-auth-token", {"expirationInMinutes": 5})

    text = "Shell access requires SHELL_INGRESS network connector to be configured on the MicroVM."
    refused(shell("HTTP_INGRESS"), 400, "ValidationException", text)
    text = "ALL_INGRESS cannot be combined with other ingress network connectors; use HTTP_INGRESS and/or SHELL_INGRESS instead"
    refused(shell("ALL_INGRESS", "SHELL_INGRESS"), 400, "ValidationException", text)
    assert shell("SHELL_INGRESS")[0] == shell("ALL_INGRESS")[0] == 200


@row("RunMicrovm", "more than one egress connector: 400 `Only one egress network connector can be provided`", "M")
def test_two_egress(api: ApiRig) -> None:
    answer = run(api, egressNetworkConnectors=[connector("INTERNET_EGRESS")] * 2)
    refused(answer, 400, "ValidationException", "Only one egress network connector can be provided")


@row("RunMicrovm", "NO_EGRESS does not exist: 400 `Unrecognized managed network connector ARN: …`; bare names are malformed", "M")
def test_connector_names(api: ApiRig) -> None:
    answer = run(api, egressNetworkConnectors=[connector("NO_EGRESS")])
    refused(answer, 400, "ValidationException", f"Unrecognized managed network connector ARN: {connector('NO_EGRESS')}")
    answer = run(api, ingressNetworkConnectors=["HTTP_INGRESS"])
    refused(answer, 400, "ValidationException", "Malformed network connector ARN")


@row("RunMicrovm", "a payload without the run hook: 400, after the length was checked", "M")
def test_payload_without_hook(api: ApiRig) -> None:
    text = "The run hook must be enabled in the MicroVM image to pass the run hook payload"
    refused(run(api, runHookPayload="x"), 400, "ValidationException", text)


@row("CreateMicrovmImage", "runtime hooks without the ready hook: 400", "M")
def test_hooks_without_ready(api: ApiRig) -> None:
    text = "The ready (/ready) MicroVM image hook must be enabled when any MicroVM lifecycle hook (run, resume, suspend, or terminate) is enabled."
    refused(create(api, hooks={"microvmHooks": {"run": "ENABLED"}}), 400, "ValidationException", text)


@row("CreateMicrovmImage", "an unsupported size: 400 with the list of sizes", "M")
def test_bad_size(api: ApiRig) -> None:
    text = (
        f"The requested memory size of 100 MiB is not supported by base MicroVM image {BASE}. "
        "Supported memory sizes in MiB are: [512, 1024, 2048, 4096, 8192]."
    )
    refused(create(api, resources=[{"minimumMemoryInMiB": 100}]), 400, "ValidationException", text)
    refused(create(api, resources=[{"minimumMemoryInMiB": 0}]), 400, "ValidationException", text.replace("100", "0", 1))


@row("CreateMicrovmImage", "an artifact that is not in S3: 400", "M")
def test_bad_artifact(api: ApiRig) -> None:
    text = "CodeArtifact URI must be a valid S3 URI in the format: s3://<bucket>/<key>"
    refused(create(api, codeArtifact={"uri": "https://example.com/app.zip"}), 400, "ValidationException", text)


@row("CreateMicrovmImage", "an unknown base version: 400 `No managed MicroVM Image with arn <arn> and version 999 is available`", "M")
def test_bad_base(api: ApiRig) -> None:
    text = f"No managed MicroVM Image with arn {BASE} and version 999 is available"
    refused(create(api, baseImageVersion="999"), 400, "ValidationException", text)


@row("CreateMicrovmImage", "a base version that is no single number: 400 `Invalid baseMicroVMImageVersion: 1.0. Expected …`", "M")
def test_base_version_with_a_point(api: ApiRig) -> None:
    for version in ("1.0", "latest", "+1", "1_0"):
        text = f"Invalid baseMicroVMImageVersion: {version}. Expected a single major version number (e.g., 1)."
        refused(create(api, baseImageVersion=version), 400, "ValidationException", text)
    assert create(api, "based", baseImageVersion="0")[2]["baseImageVersion"] == "0.0"


@row("RunMicrovm", "`logging.cloudWatch` without a role: 400 `Logging cannot be enabled without providing executionRoleArn`", "M")
def test_logging_without_a_role(api: ApiRig) -> None:
    answer = run(api, logging={"cloudWatch": {"logGroup": "mine"}})
    refused(answer, 400, "ValidationException", "Logging cannot be enabled without providing executionRoleArn")
    assert run(api, logging={"cloudWatch": {}})[0] == 400
    assert run(api, logging={"disabled": {}})[0] == run(api, logging={"cloudWatch": {"logGroup": "mine"}}, executionRoleArn=ROLE)[0] == 200


@row(
    "RunMicrovm",
    "names of log groups and streams of up to 512 characters, also those that no file can have; so for CreateMicrovmImage",
    "D",
)
def test_names_of_logs_that_are_long(api: ApiRig) -> None:
    for member, longest in (("logGroup", "/" * 512), ("logStream", "é" * 512)):
        assert run(api, logging={"cloudWatch": {"logGroup": "g", member: longest}}, executionRoleArn=ROLE)[0] == 200
        assert run(api, logging={"cloudWatch": {"logGroup": "g", member: longest + "a"}}, executionRoleArn=ROLE)[0] == 400
    assert create(api, logging={"cloudWatch": {"logGroup": "a" * 512}})[0] == 201


@row("CreateMicrovmImage", "a reserved variable: 400 `Environment variable key 'AWS_REGION' is reserved`", "M")
def test_reserved_variable(api: ApiRig) -> None:
    answer = create(api, environmentVariables={"AWS_REGION": "x"})
    refused(answer, 400, "ValidationException", "Environment variable key 'AWS_REGION' is reserved")


@row("CreateMicrovmImage", "a name that is taken: 400 `A MicroVM image with the name '<n>' already exists in this account`", "R")
def test_duplicate_name(api: ApiRig) -> None:
    refused(create(api, "plain"), 400, "ValidationException", "A MicroVM image with the name 'plain' already exists in this account")


# ---- what is not well-formed ----


@row("every operation", "broken JSON, or a wrong type: 400 SerializationException with a capital `Message`", "ours")
def test_broken_bodies(api: ApiRig) -> None:
    too_long = b'{"imageIdentifier": "a", "idlePolicy": {"suspendedDurationSeconds": 2147483648}}'
    for body in (b"{", b"\xff", b"[1]", b'"x"', b'{"imageIdentifier": 5}', b"[" * 100_000, too_long):
        status, headers, data = api.raw("POST", VMS, body)
        assert (status, headers["x-amzn-errortype"]) == (400, "SerializationException"), body[:20]
        assert list(json.loads(data)) == ["Message"]


@row(
    "every operation",
    "half a surrogate pair, which is no Unicode text: 400 SerializationException, and nothing is left of the call",
    "ours",
)
def test_half_a_surrogate_pair(api: ApiRig) -> None:
    half, sessions = "\ud800", set(api.store.sessions)
    spoilt = {"description": half, "environmentVariables": {"A": half}, "codeArtifact": {"uri": f"s3://bucket/{half}"}, "clientToken": half}
    for member, value in spoilt.items():
        assert create(api, "half", **{member: value})[:2] == (400, "SerializationException"), member
    assert run(api, clientToken=half)[:2] == (400, "SerializationException")
    logging = {"cloudWatch": {"logGroup": "g", "logStream": half}}
    assert run(api, logging=logging, executionRoleArn=ROLE)[:2] == (400, "SerializationException")
    assert set(api.store.sessions) == sessions
    assert create(api, "half")[0] == 201
    api.settled(image_arn("half"))


@row("CreateMicrovmImage", "a variable that no process can have (`=` in its name, a NUL): 400, without its value", "ours")
def test_variables_that_no_process_can_have(api: ApiRig) -> None:
    for name in ("A=B", "A\0"):
        text = f"Environment variable key '{name}' must not contain '=' or a NUL character"
        refused(create(api, environmentVariables={name: "x"}), 400, "ValidationException", text)
    text = "The value of environment variable 'A' must not contain a NUL character"
    refused(create(api, environmentVariables={"A": "hunter2\0"}), 400, "ValidationException", text)


@row("every operation", "a body of more than 1 MiB: 413", "ours")
def test_oversized_body(api: ApiRig) -> None:
    assert api.call("POST", VMS, b" " * (1 << 20) + b"{}")[0] == 413


@row("RunMicrovm", "boto3 reads every error as its modelled exception", "D")
def test_modelled_exceptions(api: ApiRig) -> None:
    client = api.client()
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.get_microvm(microvmIdentifier="microvm-none")
    with pytest.raises(client.exceptions.ValidationException):
        client.run_microvm(imageIdentifier="x")
    with pytest.raises(client.exceptions.AccessDeniedException):
        client.get_microvm_image(imageIdentifier=image_arn("x", OTHER))
    with pytest.raises(ClientError):
        client.list_microvms(maxResults=99)
