"""Network connectors of Lambda Core against the reference (section 9 and the connector rows of 1.4)."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import pytest
from api_rig import ACCOUNT, REGION, ApiRig, encoded
from botocore.session import Session
from rows import row

PATH = "/2026-04-04/network-connectors"
OPERATOR = f"arn:aws:iam::{ACCOUNT}:role/operator"
EGRESS = {"SubnetIds": ["subnet-1"], "SecurityGroupIds": ["sg-1"], "NetworkProtocol": "IPv4", "AssociatedComputeResourceTypes": ["MicroVm"]}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiRig]:
    egress = {"subnets": {"subnet-1": ["10.1.0.0/16"], "subnet-2": ["10.2.0.0/16"]}, "security_groups": {"sg-1": ["tcp:443"]}}
    one = ApiRig(tmp_path_factory.mktemp("connectors"), egress=egress)
    yield one
    one.close()


def create(api: ApiRig, name: str = "c", **changes: Any) -> tuple[int, str, dict[str, Any]]:
    egress = {**EGRESS, **changes.pop("egress", {})}
    body = {
        "Name": name, "OperatorRole": OPERATOR, "ClientToken": f"token-{name}",
        "Configuration": {"VpcEgressConfiguration": {key: value for key, value in egress.items() if value is not None}}, **changes,
    }  # fmt: skip
    return api.call("POST", PATH, {key: value for key, value in body.items() if value is not None})


@row("CreateNetworkConnector", "202; Arn, Name, Id, Configuration, OperatorRole and State PENDING; absent members are left out", "R")
@row("GetNetworkConnector", "adds LastModified and StateReason `Initial creation`; found by ARN, id or name", "R")
def test_create_and_get(api: ApiRig) -> None:
    status, _, made = create(api, "first", Tags={"team": "a"})
    assert status == 202
    assert set(made) == {"Arn", "Name", "Id", "Configuration", "OperatorRole", "State"} and made["State"] == "PENDING"
    assert made["Id"].startswith("nc-") and made["Arn"] == f"arn:aws:lambda:{REGION}:{ACCOUNT}:network-connector:{made['Id']}"
    for name in (made["Arn"], made["Id"], "first"):
        body = api.call("GET", f"{PATH}/{encoded(name)}")[2]
        assert set(body) == set(made) | {"LastModified", "StateReason"}
        assert (body["State"], body["StateReason"]) == ("ACTIVE", "Initial creation")
    assert api.call("GET", f"/2017-03-31/tags/{encoded(made['Arn'])}")[2] == {"Tags": {"team": "a"}}


@row("UpdateNetworkConnector", "202; LastUpdateStatus `Successful`; `No configuration changes detected` where nothing changed", "R")
@row("ListNetworkConnectorVersions", "newest first; each change of the configuration is one", "D")
def test_update(api: ApiRig) -> None:
    made = create(api, "updated")[2]
    same = {"ClientToken": "u1", "Configuration": made["Configuration"]}
    status, _, body = api.call("PUT", f"{PATH}/{made['Id']}", same)
    assert (status, body["LastUpdateStatus"], body["LastUpdateStatusReason"]) == (202, "Successful", "No configuration changes detected")
    other = {"ClientToken": "u2", "Configuration": {"VpcEgressConfiguration": {**EGRESS, "SubnetIds": ["subnet-2"]}}}
    body = api.call("PUT", f"{PATH}/{made['Id']}", other)[2]
    assert body["Configuration"]["VpcEgressConfiguration"]["SubnetIds"] == ["subnet-2"] and "LastUpdateStatusReason" not in body
    versions = api.call("GET", f"{PATH}/{made['Id']}/versions")[2]
    assert [one["Version"] for one in versions["NetworkConnectorVersions"]] == [2, 1] and "NextMarker" not in versions


@row("ListNetworkConnectors", "only these items carry Type; `Marker` and `MaxItems`; no NextMarker at the end", "R")
def test_list(api: ApiRig) -> None:
    for number in range(3):
        create(api, f"listed-{number}")
    found: list[str] = []
    marker = ""
    while True:
        body = api.call("GET", f"{PATH}?MaxItems=2{f'&Marker={encoded(marker)}' if marker else ''}")[2]
        assert all(item["Type"] == "VPC_EGRESS" for item in body["NetworkConnectors"]) and len(body["NetworkConnectors"]) <= 2
        found += [item["Name"] for item in body["NetworkConnectors"]]
        if "NextMarker" not in body:
            break
        marker = body["NextMarker"]
    assert {"listed-0", "listed-1", "listed-2"} <= set(found) and len(found) == len(set(found))
    refused = api.call("GET", f"{PATH}?Marker=made-up")
    assert refused[:2] == (400, "InvalidParameterValueException") and "Invalid Marker" in refused[2]["message"]
    assert "at 'maxItems' must be a number" in api.call("GET", f"{PATH}?MaxItems=1_0")[2]["message"]
    assert api.call("GET", f"{PATH}?State=FAILED&MaxItems=1")[2] == {"NetworkConnectors": []}, "the filter comes before the page"


@row("DeleteNetworkConnector", "202 with State DELETING; then 404 with a capital `Message` alone", "R")
def test_delete(api: ApiRig) -> None:
    made = create(api, "deleted")[2]
    status, _, body = api.call("DELETE", f"{PATH}/{made['Id']}")
    assert (status, body["State"]) == (202, "DELETING")
    status, kind, body = api.call("GET", f"{PATH}/{made['Id']}")
    assert (status, kind, body) == (404, "ResourceNotFoundException", {"Message": f"Network connector not found for: {made['Arn']}"})


@row("DeleteNetworkConnector", "idempotent: one that was deleted is no error, by its ARN, id or name; one that never was is 404", "D")
def test_delete_again(api: ApiRig) -> None:
    made = create(api, "twice")[2]
    first = api.call("DELETE", f"{PATH}/{made['Id']}")[2]
    for name in (made["Arn"], made["Id"], "twice"):
        status, _, body = api.call("DELETE", f"{PATH}/{encoded(name)}")
        assert (status, body) == (202, {member: first[member] for member in ("Arn", "Name", "Id", "State")})
    assert api.call("DELETE", f"{PATH}/nc-never")[:2] == (404, "ResourceNotFoundException")
    assert create(api, "twice", ClientToken="other")[2]["Id"] != made["Id"]


@row("DeleteNetworkConnector", "a version's ARN deletes that version alone, and not the latest; Get answers that version's own values", "D")
def test_a_connectors_versions(api: ApiRig) -> None:
    made = create(api, "versions")[2]
    other = {"ClientToken": "v2", "Configuration": {"VpcEgressConfiguration": {**EGRESS, "SubnetIds": ["subnet-2"]}}}
    api.call("PUT", f"{PATH}/{made['Id']}", other)
    first = api.call("GET", f"{PATH}/{encoded(made['Arn'] + ':1')}")[2]
    assert (first["Version"], first["VersionArn"]) == (1, f"{made['Arn']}:1") and first["Configuration"] == made["Configuration"]
    assert api.call("DELETE", f"{PATH}/{encoded(made['Arn'] + ':2')}")[:2] == (409, "ResourceConflictException")
    assert api.call("DELETE", f"{PATH}/{encoded(made['Arn'] + ':9')}")[0] == 404
    for _ in range(2):
        status, _, body = api.call("DELETE", f"{PATH}/{encoded(made['Arn'] + ':1')}")
        assert (status, body["Version"], body["State"]) == (202, 1, "DELETING")
    assert api.call("GET", f"{PATH}/{encoded(made['Arn'] + ':1')}")[0] == 404
    versions = api.call("GET", f"{PATH}/{made['Id']}/versions")[2]["NetworkConnectorVersions"]
    assert [one["Version"] for one in versions] == [2]
    assert api.call("GET", f"{PATH}/{made['Id']}")[2]["State"] == "ACTIVE"


@row("UpdateNetworkConnector", "AssociatedComputeResourceTypes and NetworkProtocol may be left out: they stay as they are", "M")
def test_an_update_needs_no_more_than_its_model(api: ApiRig) -> None:
    made = create(api, "shorter")[2]
    asked = {"ClientToken": "s1", "Configuration": {"VpcEgressConfiguration": {"SubnetIds": ["subnet-2"]}}}
    status, _, body = api.call("PUT", f"{PATH}/{made['Id']}", asked)
    assert (status, body["State"], body["LastUpdateStatus"]) == (202, "ACTIVE", "Successful")
    kept = {"NetworkProtocol": "IPv4", "AssociatedComputeResourceTypes": ["MicroVm"], "SubnetIds": ["subnet-2"]}
    assert body["Configuration"]["VpcEgressConfiguration"] == kept


@row("network connectors", "times are ISO 8601 in UTC with milliseconds, as the model has them; those of microVMs are numbers", "R")
def test_times(api: ApiRig) -> None:
    made = create(api, "timed")[2]
    for body in (
        api.call("GET", f"{PATH}/{made['Id']}")[2],
        api.call("GET", PATH)[2]["NetworkConnectors"][0],
        api.call("GET", f"{PATH}/{made['Id']}/versions")[2]["NetworkConnectorVersions"][0],
        api.call("PUT", f"{PATH}/{made['Id']}", {"ClientToken": "t", "OperatorRole": OPERATOR})[2],
    ):
        assert len(body["LastModified"]) == 24 and body["LastModified"][10] == "T" and body["LastModified"].endswith("Z")
    assert isinstance(api.client("lambda-core").get_network_connector(Identifier="timed")["LastModified"], datetime.datetime)


@row("CreateNetworkConnector", "constraints come before all logic: 400 ValidationException with a camelCase path", "R")
def test_constraints(api: ApiRig) -> None:
    status, kind, body = create(api, "bad", egress={"SubnetIds": [f"subnet-{n}" for n in range(17)]}, ClientToken=None, OperatorRole=None)
    assert (status, kind) == (400, "ValidationException")
    assert (
        "at 'configuration.vpcEgressConfiguration.subnetIds' failed to satisfy constraint: Member must have length less than or equal to 16"
        in body["message"]
    )


@row(
    "CreateNetworkConnector",
    "`ClientToken is a required field`; `NetworkConnectorOperatorRole is required for VPC_EGRESS connector type`",
    "R",
)
@row("CreateNetworkConnector", "NetworkProtocol and AssociatedComputeResourceTypes are required too, though the model says optional", "R")
@row("CreateNetworkConnector", "a subnet or security group that the operator did not configure: 400, it does not exist", "ours")
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ClientToken": None}, "ClientToken is a required field"),
        ({"OperatorRole": None}, "NetworkConnectorOperatorRole is required for VPC_EGRESS connector type"),
        ({"egress": {"NetworkProtocol": None}}, "NetworkProtocol is a required field"),
        ({"egress": {"AssociatedComputeResourceTypes": None}}, "AssociatedComputeResourceTypes is a required field"),
        ({"egress": {"SubnetIds": ["subnet-9"]}}, "The subnet ID 'subnet-9' does not exist"),
        ({"egress": {"SecurityGroupIds": ["sg-9"]}}, "The security group 'sg-9' does not exist"),
    ],
)  # fmt: skip
def test_logic(api: ApiRig, changes: dict[str, Any], text: str) -> None:
    status, kind, body = create(api, "logic", **changes)
    assert (status, kind, body["message"]) == (400, "InvalidParameterValueException", text)


@row("CreateNetworkConnector", "the same token and parameters: the first reply; others, or a name that is taken: 409", "ours")
def test_tokens(api: ApiRig) -> None:
    first = create(api, "again")
    assert create(api, "again") == first
    assert create(api, "again", Tags={"a": "b"})[:2] == (409, "ResourceConflictException")
    assert create(api, "again", ClientToken="another")[:2] == (409, "ResourceConflictException")
    api.call("DELETE", f"{PATH}/{first[2]['Id']}")
    later = create(api, "again")
    assert later[0] == 202 and later[2]["Id"] != first[2]["Id"], "the token of what was deleted is free"
    assert api.call("GET", f"{PATH}/again")[2]["State"] == "ACTIVE"


@row("RunMicrovm", "an own VPC_EGRESS connector is taken for egress, not for ingress; one in use is not deleted", "ours")
def test_use(api: ApiRig) -> None:
    arn, made = api.image("vpc"), create(api, "used")[2]
    one = api.run(arn, egressNetworkConnectors=[made["Arn"]])
    assert api.call("GET", f"/2025-09-09/microvms/{one}")[2]["egressNetworkConnectors"] == [made["Arn"]]
    assert api.call("DELETE", f"{PATH}/{made['Id']}")[:2] == (409, "ResourceConflictException")
    body = api.call("POST", "/2025-09-09/microvms", {"imageIdentifier": arn, "ingressNetworkConnectors": [made["Arn"]]})[2]
    assert body["message"] == f"Unrecognized managed network connector ARN: {made['Arn']}"


@row("Runtime operations", "all sixteen of lambda-core: 403 AccessDeniedException with a null message", "R")
def test_runtimes(api: ApiRig) -> None:
    model = Session().get_service_model("lambda-core")
    names = [name for name in model.operation_names if "NetworkConnector" not in name]
    assert len(names) == 16
    for name in names:
        http = model.operation_model(name).http
        path = str(http["requestUri"]).replace("{RuntimeName}", "r").replace("{Name}", "n")
        assert api.call(str(http["method"]), path, {}) == (403, "AccessDeniedException", {"message": None}), name


@row("network connectors", "boto3 reads replies and errors of lambda-core", "D")
def test_boto3(api: ApiRig) -> None:
    client = api.client("lambda-core")
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.get_network_connector(Identifier="nc-none")
    with pytest.raises(client.exceptions.InvalidParameterValueException):
        client.create_network_connector(
            Name="x", Configuration={"VpcEgressConfiguration": {**EGRESS, "SubnetIds": ["subnet-9"]}}, OperatorRole=OPERATOR
        )
    assert client.list_network_connectors()["NetworkConnectors"] is not None
