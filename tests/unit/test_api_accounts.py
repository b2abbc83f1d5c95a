"""Several accounts on one service: who may do what, what one sees of another, temporary credentials, quotas, the audit trail."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api_rig import ACCOUNT, BASE, KEY, OTHER, REGION, ROLE, SECRET, ApiRig, connector, encoded, image_arn
from botocore import xform_name
from botocore.exceptions import ClientError
from botocore.session import Session
from rows import row

VMS, IMAGES = "/2025-09-09/microvms", "/2025-09-09/microvm-images"
_users = itertools.count()


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiRig]:
    one = ApiRig(tmp_path_factory.mktemp("accounts"))
    one.image("plain", tags={"team": "blue"})
    one.do(one.accounts.create_account("other", OTHER))
    yield one
    one.close()


PLAIN = image_arn("plain")


def allow(*actions: str, resource: str = "*", **condition: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": list(actions), "Resource": resource, **({"Condition": condition} if condition else {})}


def deny(*actions: str, resource: str = "*") -> dict[str, Any]:
    return {"Effect": "Deny", "Action": list(actions), "Resource": resource}


def user(api: ApiRig, *statements: dict[str, Any], account: str = ACCOUNT) -> tuple[str, str]:
    """A new user's key."""
    policy = {"Version": "2012-10-17", "Statement": list(statements)} if statements else None
    key = api.do(api.accounts.create_key(account, f"u{next(_users)}", policy))
    return key.id, key.secret


def status(api: ApiRig, key: tuple[str, ...], method: str, path: str, body: Any = None) -> int:
    return api.call(method, path, body, key=key)[0]


@row("permissions", "least privilege: a key without a policy may do nothing; the text names user, action and resource", "ours")
def test_no_policy(api: ApiRig) -> None:
    key = user(api)
    code, kind, body = api.call("GET", f"{IMAGES}/{encoded(PLAIN)}", key=key)
    assert (code, kind) == (403, "AccessDeniedException")
    assert body["message"].startswith(f"User: arn:aws:iam::{ACCOUNT}:user/u")
    assert f"is not authorized to perform: lambda:GetMicrovmImage on resource: {PLAIN} because no identity-based policy" in body["message"]


@row("permissions", "calls on a microVM are judged by its image's ARN", "D")
def test_instance_calls(api: ApiRig) -> None:
    one = api.run(PLAIN)
    may = user(api, allow("lambda:GetMicrovm", "lambda:SuspendMicrovm", resource=PLAIN))
    may_not = user(api, allow("lambda:*", resource=image_arn("other-image")))
    assert status(api, may, "GET", f"{VMS}/{one}") == 200
    assert status(api, may_not, "GET", f"{VMS}/{one}") == 403
    assert status(api, may, "DELETE", f"{VMS}/{one}") == 403


@row("permissions", "an explicit deny wins", "D")
def test_deny_wins(api: ApiRig) -> None:
    key = user(api, allow("*"), deny("lambda:Terminate*"))
    one = api.run(PLAIN)
    assert status(api, key, "GET", f"{VMS}/{one}") == 200
    code, _, body = api.call("DELETE", f"{VMS}/{one}", key=key)
    assert code == 403 and body["message"].endswith("with an explicit deny in an identity-based policy")


@row("RunMicrovm", "needs lambda:RunMicrovm, lambda:PassNetworkConnector also for the defaults, iam:PassRole where a role is given", "D")
def test_run_needs(api: ApiRig) -> None:
    body = {"imageIdentifier": PLAIN}
    assert status(api, user(api, allow("lambda:RunMicrovm")), "POST", VMS, body) == 403
    passes = user(api, allow("lambda:RunMicrovm", "lambda:PassNetworkConnector"))
    assert status(api, passes, "POST", VMS, body) == 200
    code, _, answer = api.call("POST", VMS, {**body, "executionRoleArn": ROLE}, key=passes)
    assert code == 403 and f"iam:PassRole on resource: {ROLE}" in answer["message"]
    to_lambda = allow("iam:PassRole", resource=ROLE, StringEquals={"iam:PassedToService": "lambda.amazonaws.com"})
    roles = user(api, allow("lambda:RunMicrovm", "lambda:PassNetworkConnector"), to_lambda)
    assert status(api, roles, "POST", VMS, {**body, "executionRoleArn": ROLE}) == 200
    closed = user(api, allow("lambda:*"), deny("lambda:PassNetworkConnector", resource=connector("SHELL_INGRESS")))
    assert status(api, closed, "POST", VMS, {**body, "ingressNetworkConnectors": [connector("SHELL_INGRESS")]}) == 403


@row("RunMicrovm", "a role of another account: 403 for iam:PassRole", "M")
def test_foreign_role(api: ApiRig) -> None:
    code, kind, body = api.call("POST", VMS, {"imageIdentifier": PLAIN, "executionRoleArn": f"arn:aws:iam::{OTHER}:role/x"})
    assert (code, kind) == (403, "AccessDeniedException") and "iam:PassRole" in body["message"]


@row("permissions", "conditions: aws:ResourceTag, aws:RequestTag, aws:TagKeys, aws:SourceIp, aws:SecureTransport, aws:username", "D")
def test_conditions(api: ApiRig) -> None:
    path = f"{IMAGES}/{encoded(PLAIN)}"
    get = "lambda:GetMicrovmImage"
    assert status(api, user(api, allow(get, StringEquals={"aws:ResourceTag/team": "blue"})), "GET", path) == 200
    assert status(api, user(api, allow(get, StringEquals={"aws:ResourceTag/team": "red"})), "GET", path) == 403
    assert status(api, user(api, allow(get, IpAddress={"aws:SourceIp": "127.0.0.0/8"})), "GET", path) == 200
    assert status(api, user(api, allow(get, NotIpAddress={"aws:SourceIp": "127.0.0.0/8"})), "GET", path) == 403
    assert status(api, user(api, allow(get, Bool={"aws:SecureTransport": "true"})), "GET", path) == 403
    tags = f"/2017-03-31/tags/{encoded(PLAIN)}"
    only = user(api, allow("lambda:TagResource", **{"ForAllValues:StringEquals": {"aws:TagKeys": ["cost"]}}))
    assert status(api, only, "POST", tags, {"Tags": {"cost": "1"}}) == 204
    assert status(api, only, "POST", tags, {"Tags": {"cost": "1", "team": "red"}}) == 403
    assert (
        status(
            api, user(api, allow("lambda:TagResource", StringEquals={"aws:RequestTag/cost": "2"})), "POST", tags, {"Tags": {"cost": "3"}}
        )
        == 403
    )


@row("accounts", "another account's microVM is not found, its image and its list are as if they were not there", "ours")
def test_accounts_are_apart(api: ApiRig) -> None:
    theirs = user(api, allow("*"), account=OTHER)
    one = api.run(PLAIN)
    unknown = api.call("GET", f"{VMS}/microvm-none", key=theirs)
    known = api.call("GET", f"{VMS}/{one}", key=theirs)
    assert known[:2] == unknown[:2] and known[2]["message"] == f"MicroVM not found: {one}"
    for method, tail in (("DELETE", ""), ("POST", "/suspend"), ("POST", "/resume")):
        assert status(api, theirs, method, f"{VMS}/{one}{tail}") == 404
    there = api.call("GET", f"{IMAGES}/{encoded(PLAIN)}", key=theirs)
    nowhere = api.call("GET", f"{IMAGES}/{encoded(image_arn('none'))}", key=theirs)
    assert there[:2] == nowhere[:2] == (403, "AccessDeniedException")
    assert there[2]["message"].replace("plain", "none") == nowhere[2]["message"]
    assert api.call("GET", VMS, key=theirs)[2]["items"] == api.call("GET", IMAGES, key=theirs)[2]["items"] == []
    assert status(api, theirs, "POST", VMS, {"imageIdentifier": PLAIN}) == 403
    own = {
        "baseImageArn": BASE,
        "buildRoleArn": f"arn:aws:iam::{OTHER}:role/b",
        "codeArtifact": {"uri": "s3://bucket/a.zip"},
        "name": "plain",
    }
    made = api.call("POST", IMAGES, own, key=theirs)
    assert made[0] == 201 and made[2]["imageArn"] == image_arn("plain", OTHER)
    api.settled_in(image_arn("plain", OTHER))
    token = api.call("GET", f"{VMS}?maxResults=1")[2]["nextToken"]
    if token:
        assert status(api, theirs, "GET", f"{VMS}?nextToken={encoded(token)}") == 400


@row("accounts", "client tokens are each account's own", "ours")
def test_client_tokens_are_apart(api: ApiRig) -> None:
    theirs = user(api, allow("*"), account=OTHER)
    mine = api.call("POST", VMS, {"imageIdentifier": PLAIN, "clientToken": "shared"})
    other = api.call("POST", VMS, {"imageIdentifier": image_arn("plain", OTHER), "clientToken": "shared"}, key=theirs)
    assert mine[0] == other[0] == 200 and mine[2]["microvmId"] != other[2]["microvmId"]


@row("credentials", "temporary ones are signed for with their session token, and may what their role may", "D")
def test_temporary_credentials(api: ApiRig) -> None:
    role = f"arn:aws:iam::{ACCOUNT}:role/worker"
    made = api.accounts.issue(role, "microvm-1")
    key = (made.access_key, made.secret, made.token)
    path = f"{IMAGES}/{encoded(PLAIN)}"
    code, _, body = api.call("GET", path, key=key)
    assert code == 403 and body["message"].startswith(f"User: arn:aws:sts::{ACCOUNT}:assumed-role/worker/microvm-1 is not authorized")
    api.do(api.accounts.put_role(role, {"Statement": [allow("lambda:GetMicrovmImage", resource=PLAIN)]}))
    assert status(api, key, "GET", path) == 200
    assert api.client(key=key).get_microvm_image(imageIdentifier=PLAIN)["name"] == "plain"
    assert api.call("GET", path, key=key[:2])[1] == "UnrecognizedClientException"
    assert api.call("GET", path, key=(made.access_key, made.secret, made.token[:-8] + "AAAAAAA="))[1] == "UnrecognizedClientException"
    old = api.accounts.issue(role, "microvm-1", seconds=-1)
    assert api.call("GET", path, key=(old.access_key, old.secret, old.token))[1] == "ExpiredTokenException"


@row("STS", "GetCallerIdentity says who signs; AssumeRole, where the policy allows it, gives credentials of a role of the account", "D")
def test_sts(api: ApiRig) -> None:
    root = api.client("sts")
    assert root.get_caller_identity()["Arn"] == f"arn:aws:iam::{ACCOUNT}:root"
    role = f"arn:aws:iam::{ACCOUNT}:role/assumed"
    api.do(api.accounts.put_role(role, {"Statement": [allow("lambda:ListMicrovms")]}))
    made = root.assume_role(RoleArn=role, RoleSessionName="me", DurationSeconds=900)
    key = tuple(made["Credentials"][name] for name in ("AccessKeyId", "SecretAccessKey", "SessionToken"))
    assert made["AssumedRoleUser"]["Arn"] == f"arn:aws:sts::{ACCOUNT}:assumed-role/assumed/me"
    assert api.client("sts", key).get_caller_identity()["Arn"] == made["AssumedRoleUser"]["Arn"]
    assert api.client(key=key).list_microvms()["items"]
    nobody = api.client("sts", user(api))
    assert nobody.get_caller_identity()["Account"] == ACCOUNT, "as everywhere, nobody needs permission to ask who they are"
    for client, arn in ((nobody, role), (root, f"arn:aws:iam::{OTHER}:role/x"), (root, "nonsense")):
        with pytest.raises(ClientError) as error:
            client.assume_role(RoleArn=arn, RoleSessionName="me")
        assert error.value.response["Error"]["Code"] in ("AccessDenied", "ValidationError")
    with pytest.raises(ClientError) as error:
        root.get_session_token()
    assert error.value.response["Error"]["Code"] == "InvalidAction"


@row("STS", "a duration that is no plain number, and what would narrow or guard the credentials and is not evaluated here: 400", "ours")
@pytest.mark.parametrize(
    "asked",
    [{"DurationSeconds": "9²"}, {"DurationSeconds": "9_00"}, {"DurationSeconds": "000043200999"}, {"Tags": [{"Key": "a", "Value": "b"}]},
     {"PolicyArns": [{"arn": "arn:aws:iam::aws:policy/ReadOnlyAccess"}]}, {"SerialNumber": "GAHT12345678", "TokenCode": "123456"}],
)  # fmt: skip
def test_what_sts_does_not_evaluate_is_refused(api: ApiRig, asked: dict[str, Any]) -> None:
    role = f"arn:aws:iam::{ACCOUNT}:role/assumed"
    with pytest.raises(ClientError) as error:
        api.client("sts").assume_role(RoleArn=role, RoleSessionName="me", **asked)
    assert error.value.response["Error"]["Code"] == "ValidationError"


@row(
    "STS",
    "AssumeRole's Policy narrows the credentials: they may what it and the role's own both allow; a role's session assumes another for an hour at most",
    "D",
)
def test_sessions_are_narrowed_and_chained(api: ApiRig) -> None:
    role = f"arn:aws:iam::{ACCOUNT}:role/wide"
    api.do(api.accounts.put_role(role, {"Statement": [allow("lambda:*", "sts:AssumeRole")]}))
    only_lists = json.dumps({"Version": "2012-10-17", "Statement": [allow("lambda:ListMicrovms", "sts:AssumeRole")]})
    made = api.client("sts").assume_role(RoleArn=role, RoleSessionName="me", Policy=only_lists)["Credentials"]
    key = (made["AccessKeyId"], made["SecretAccessKey"], made["SessionToken"])
    assert status(api, key, "GET", VMS) == 200 and status(api, key, "GET", IMAGES) == 403
    chained = api.client("sts", key)
    assert chained.assume_role(RoleArn=role, RoleSessionName="me", DurationSeconds=3600)
    with pytest.raises(ClientError) as error:
        chained.assume_role(RoleArn=role, RoleSessionName="me", DurationSeconds=3601)
    assert error.value.response["Error"]["Code"] == "ValidationError"


@row("Service Quotas", "the five calls that read: what limits.profile limits; a quota that is not there or not limited is refused", "ours")
def test_quotas_are_readable(api: ApiRig, tmp_path: Any) -> None:
    client = api.client("service-quotas")
    assert [one["ServiceCode"] for one in client.list_services()["Services"]] == ["lambda"]
    own = {one["QuotaCode"]: one["Value"] for one in client.list_service_quotas(ServiceCode="lambda")["Quotas"]}
    limits = {"L-B430C318": 28_800.0, "network-connectors": 100.0, "microvms": 2048.0, "microvm-image-builds": 100.0}
    assert own == limits, "nothing else is limited"
    for ask in ({"ServiceCode": "lambda", "QuotaCode": "L-CD1C0CC4"}, {"ServiceCode": "ec2", "QuotaCode": "L-1"}):
        with pytest.raises(client.exceptions.NoSuchResourceException):
            client.get_service_quota(**ask)
    with pytest.raises(client.exceptions.InvalidPaginationTokenException):
        client.list_service_quotas(ServiceCode="lambda", NextToken="made-up")
    with pytest.raises(client.exceptions.AccessDeniedException):
        api.client("service-quotas", user(api)).list_services()
    with pytest.raises(ClientError, match=r"quotas are set by the host's limits\.profile"):
        client.request_service_quota_increase(ServiceCode="lambda", QuotaCode="L-CD1C0CC4", DesiredValue=1)
    small = ApiRig(tmp_path, limits={"profile": "small"})
    try:
        client = small.client("service-quotas")
        pages = client.get_paginator("list_service_quotas").paginate(ServiceCode="lambda", PaginationConfig={"PageSize": 5})
        found = {one["QuotaCode"]: one for page in pages for one in page["Quotas"]}
        assert found["L-CD1C0CC4"]["Value"] == 8.0 and found["L-91B95582"]["Period"] == {"PeriodValue": 1, "PeriodUnit": "SECOND"}
        assert client.get_service_quota(ServiceCode="lambda", QuotaCode="L-CD1C0CC4")["Quota"] == found["L-CD1C0CC4"]
        default = client.get_aws_default_service_quota(ServiceCode="lambda", QuotaCode="microvm-images")["Quota"]
        assert default["Value"] == 100.0 and default["QuotaArn"] == "arn:aws:servicequotas:us-east-1::lambda/microvm-images"
        assert len(client.list_aws_default_service_quotas(ServiceCode="lambda")["Quotas"]) == len(found) == 14
    finally:
        small.close()


@row("every operation", "the generated AWS configuration names only what answers here, with an error that says what is not served", "ours")
def test_what_the_configuration_names_is_served(api: ApiRig, tmp_path: Any) -> None:
    from gateway.api.sigv4 import SERVICES
    from gateway.instance import SERVED

    session = Session()
    services = {name.replace("-", "_"): name for name in session.get_available_services()}
    names = {"cloudwatch_logs": "logs"}
    assert "iam" not in SERVED
    for service in SERVED:
        name = names.get(service) or services[service]
        client = api.client(name)
        assert client.meta.service_model.signing_name in SERVICES
        operation = "GetCallerIdentity" if name == "sts" else next(
            one for one in sorted(client.meta.service_model.operation_names, reverse=True)
            if one.startswith(("ListN", "ListM", "ListServices", "DescribeLogGroups"))
            and not client.meta.service_model.operation_model(one).input_shape.required_members
        )  # fmt: skip
        assert getattr(client, xform_name(operation))()["ResponseMetadata"]["HTTPStatusCode"] == 200, service


@pytest.mark.service
@row("Service Quotas", "AWS's command line reads quotas, and pages and filters lists, with the endpoint of this API", "ours")
def test_the_aws_command_line(api: ApiRig) -> None:
    def aws(*words: str) -> Any:
        environment = {
            "PATH": os.environ["PATH"], "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{api.port}", "AWS_CONFIG_FILE": "/dev/null",
        }  # fmt: skip
        command = [str(Path(sys.executable).with_name("aws")), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    quota = aws("service-quotas", "get-service-quota", "--service-code", "lambda", "--quota-code", "L-B430C318")["Quota"]
    assert quota["Value"] == 28_800.0
    one = api.run(PLAIN)
    listed = aws("lambda-microvms", "list-microvms", "--image-identifier", PLAIN, "--page-size", "1")["items"]
    assert one in [item["microvmId"] for item in listed]
    assert aws("lambda-microvms", "get-microvm-image", "--image-identifier", PLAIN)["tags"]["team"] == "blue"
    assert aws("lambda-core", "list-network-connectors")["NetworkConnectors"] == []


@row("accounts", "a deleted key is unknown at once; an account that has something left is not deleted", "ours")
def test_deletion(api: ApiRig) -> None:
    key = user(api, allow("*"))
    assert status(api, key, "GET", VMS) == 200
    api.do(api.accounts.delete_key(key[0]))
    assert api.call("GET", VMS, key=key)[1] == "UnrecognizedClientException"
    with pytest.raises(Exception, match="still has microVMs or images"):
        api.do(api.accounts.delete_account(OTHER))


@row("audit", "one line a call, allowed or refused, in CloudTrail's format; secrets are not in it", "D")
def test_audit(api: ApiRig) -> None:
    api.call("POST", VMS, {"imageIdentifier": PLAIN, "clientToken": "very-secret"})
    one = api.run(PLAIN)
    token = api.call("POST", f"{VMS}/{one}/auth-token", {"expirationInMinutes": 5, "allowedPorts": [{"port": 80}]})[2]["authToken"]
    key = user(api)
    api.call("GET", f"{VMS}/{one}", key=key)
    api.call("GET", VMS, sign=False)
    api.call("GET", VMS, key=(KEY, "wrong"))
    minted, refused = api.records()[-2:]
    unsigned, wrong = api.records("refused.jsonl")[-2:]
    assert (minted["eventName"], minted["eventCategory"], minted["readOnly"], minted["managementEvent"]) == (
        "CreateMicrovmAuthToken",
        "Data",
        False,
        False,
    )
    assert minted["userIdentity"] == {"type": "Root", "arn": f"arn:aws:iam::{ACCOUNT}:root", "accountId": ACCOUNT, "accessKeyId": KEY}
    assert minted["resources"] == [{"ARN": PLAIN, "accountId": ACCOUNT, "type": "AWS::Lambda::MicrovmImage"}]
    assert minted["responseElements"] == {"authToken": "HIDDEN_DUE_TO_SECURITY_REASONS"} and "errorCode" not in minted
    assert (refused["errorCode"], refused["userIdentity"]["type"]) == ("AccessDeniedException", "IAMUser")
    assert unsigned["errorCode"] == "MissingAuthenticationTokenException" and unsigned["userIdentity"]["type"] == "Unknown"
    assert wrong["errorCode"] == "InvalidSignatureException"
    text = json.dumps([*api.records(), *api.records("refused.jsonl")])
    assert "very-secret" not in text and token["X-aws-proxy-auth"] not in text


@row("quotas", "profile `small`: Run beyond the rate is 429 ThrottlingException with Retry-After and its codes", "D")
def test_quotas(tmp_path: Any) -> None:
    api = ApiRig(tmp_path, limits={"profile": "small", "memory_mib": 4096})
    try:
        api.image("sized", resources=[{"minimumMemoryInMiB": 2048}])
        codes = []
        for _ in range(3):
            status_, headers, data = api.raw("POST", VMS, {"imageIdentifier": image_arn("sized")})
            codes.append(status_)
        assert codes[0] == 200 and codes[-1] == 429
        assert headers["x-amzn-errortype"] == "ThrottlingException" and int(headers["retry-after"]) >= 1
        assert json.loads(data) == {"message": "Rate exceeded", "serviceCode": "lambda", "quotaCode": "L-91B95582"}
        answers = [api.call("DELETE", f"{VMS}/microvm-no") for _ in range(3)]
        assert answers[-1] == (429, "ThrottlingException", {"message": "Rate exceeded", "serviceCode": "lambda", "quotaCode": None})
    finally:
        api.close()


@row("quotas", "the memory pool counts RUNNING and SUSPENDED: 402 in the recorded words, all details null", "R")
@row("quotas", "builds at once: 402, `maximum number of concurrent builds`", "M")
def test_memory_and_build_quotas(tmp_path: Any) -> None:
    api = ApiRig(tmp_path, limits={"memory_mib": 1024})
    try:
        arn = api.image("sized", resources=[{"minimumMemoryInMiB": 512}])
        one, _ = api.run(arn), api.run(arn)
        api.call("POST", f"{VMS}/{one}/suspend")
        code, kind, body = api.call("POST", VMS, {"imageIdentifier": arn})
        assert (code, kind) == (402, "ServiceQuotaExceededException")
        text = "The base maximum allocated memory limit has been reached for this account."
        assert body == {"message": text, "resourceId": None, "resourceType": None, "serviceCode": None, "quotaCode": None}
    finally:
        api.close()
    small = ApiRig(tmp_path / "small", limits={"profile": "small"})
    try:
        small.pipeline.held["one"] = asyncio.Event()
        small.image("one", built=False)
        body = {"baseImageArn": BASE, "buildRoleArn": ROLE, "codeArtifact": {"uri": "s3://bucket/app.zip"}, "name": "two"}
        code, kind, answer = small.call("POST", IMAGES, body)
        assert (code, kind) == (402, "ServiceQuotaExceededException") and "maximum number of concurrent builds" in answer["message"]
    finally:
        small.close()


@row("quotas", "microVMs, their disks and builds, as settings bound them: 402 with the number; what has ended counts no more", "ours")
def test_numbers_and_disks_are_bounded(tmp_path: Any) -> None:
    api = ApiRig(tmp_path, limits={"microvms": 2, "disk_gib": 24, "builds": 1})

    def said(answer: tuple[int, str, dict[str, Any]]) -> str:
        assert answer[:2] == (402, "ServiceQuotaExceededException"), answer
        return str(answer[2]["message"])

    try:
        small, large = api.image("small"), api.image("large", resources=[{"minimumMemoryInMiB": 4096}])
        one, _ = api.run(small), api.run(small)
        text = "The maximum number of MicroVMs has been reached for this account: 2."
        assert said(api.call("POST", VMS, {"imageIdentifier": small})) == text
        api.call("DELETE", f"{VMS}/{one}")
        api.reach(one, "TERMINATED")
        last = api.run(large)
        api.call("POST", f"{VMS}/{last}/suspend")
        api.reach(last, "SUSPENDED")
        api.service.quotas = replace(api.service.quotas, microvms=0)
        text = "The maximum disk of all MicroVMs has been reached for this account: 24 GiB."
        assert said(api.call("POST", VMS, {"imageIdentifier": small})) == text, "16 and 8 are taken"
        api.pipeline.held["held"] = asyncio.Event()
        api.image("held", built=False)
        body = {"baseImageArn": BASE, "buildRoleArn": ROLE, "codeArtifact": {"uri": "s3://bucket/app.zip"}, "name": "two"}
        assert "maximum number of concurrent builds" in said(api.call("POST", IMAGES, body))
    finally:
        api.close()
