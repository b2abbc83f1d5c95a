"""What a microVM reaches, and what it does not: the outside, its host, its neighbours, metadata, names."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from outside import NEIGHBOUR, PORT, PRIVATE, SERVER, UPLINK, Outside, bound
from service import PATIENCE, Instance, until
from test_client_hello import hello, records, server_name
from wire import get

pytestmark = pytest.mark.vm
_ANSWER_SECONDS = min(1.5 * PATIENCE, 8)  # of what is not reached a test has several
METADATA = "http://169.254.169.254"
ROLE = "arn:aws:iam::123456789012:role/worker"


class Guest:
    """The test application in a microVM, asked to act."""

    def __init__(self, instance: Instance, vm: dict[str, Any]) -> None:
        self._bundle = instance.root / "tls/ca.crt"
        self.id, self._endpoint, self._token = vm["microvmId"], vm["endpoint"], instance.token(vm["microvmId"])

    def get(self, path: str) -> dict[str, Any]:
        return dict(get(self._endpoint, self._bundle, self._token, path).json())

    def connect(self, host: str, port: int = PORT, **query: Any) -> dict[str, Any]:
        more = "".join(f"&{name}={value}" for name, value in query.items())
        return self.get(f"/connect?host={host}&port={port}&s={_ANSWER_SECONDS}{more}")

    def fetch(self, url: str, method: str = "GET", **headers: str) -> dict[str, Any]:
        ask = {"url": url, "method": method, "headers": {name.replace("_", "-"): value for name, value in headers.items()}}
        return dict(get(self._endpoint, self._bundle, self._token, "/fetch", method="POST", body=json.dumps(ask).encode()).json())


@pytest.fixture(scope="module")
def guest(instance: Instance, app: str) -> Iterator[Guest]:
    policy = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
    one = Guest(instance, instance.launch(app, executionRoleArn=ROLE, idlePolicy=policy))
    yield one
    instance.terminate(one.id)


def test_internet_egress_reaches_the_outside_by_tcp_and_name(guest: Guest) -> None:
    assert guest.connect(SERVER) == {"heard": f"{UPLINK} hello"}, "as one address of the uplink's"
    assert guest.get("/resolve?name=example.com") == {"address": SERVER}
    assert guest.connect("example.com")["heard"].endswith("hello")


def test_questions_for_names_over_tcp_are_relayed(guest: Guest) -> None:
    """They come from the host's end of the link, whose connections the guest otherwise takes for its own (vmm/guest/gate.c)."""
    assert guest.connect("169.254.77.1", 53, hex=b"question".hex())["heard"].endswith("question")


@pytest.mark.parametrize(
    ("host", "query"),
    [
        (UPLINK, {}),  # the host
        (NEIGHBOUR, {}),  # in the host's network
        (PRIVATE, {}),  # a private network behind it
        ("169.254.77.1", {}),  # the host's end of its own link
        ("169.254.169.254", {}),  # metadata, another port
        ("127.0.0.153", {"port": 53}),  # what is loopback to the host is loopback to the guest
        (SERVER, {"udp": 1}),  # the service shuts UDP
    ],
)
def test_nothing_else_is_reached(guest: Guest, host: str, query: dict[str, Any]) -> None:
    assert "error" in guest.connect(host, **query)


def test_a_neighbour_is_not_reached(instance: Instance, app: str, guest: Guest) -> None:
    vm = instance.launch(app)
    try:
        for address in _addresses(instance, vm["microvmId"]):
            assert "error" in guest.connect(address, 8080), address
    finally:
        instance.terminate(vm["microvmId"])


def _addresses(instance: Instance, identifier: str) -> set[str]:
    """Those of a microVM's way out: its link's, and all of the uplink namespace's, which has both ends' networks."""
    list_them = ("ip", "-4", "addr")
    inner = instance.inside(identifier, lambda: subprocess.run(list_them, capture_output=True, text=True, check=True).stdout)
    found = [set(re.findall(r"inet (100\.64\.\d+\.\d+)", text)) for text in (inner, _in_uplink(instance, *list_them))]
    assert all(found)
    return found[0] | found[1]


def _in_uplink(instance: Instance, *command: str) -> str:
    path = instance.run / instance.name / "uplink"
    return subprocess.run(["nsenter", f"--net={path}", *command], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def connected(instance: Instance, subnet: str, group: str = "sg-1") -> Iterator[str]:
    """A VPC_EGRESS connector to one subnet of the settings'."""
    core = instance.client("lambda-core")
    egress = {
        "SubnetIds": [subnet],
        "SecurityGroupIds": [group],
        "NetworkProtocol": "IPv4",
        "AssociatedComputeResourceTypes": ["MicroVm"],
    }
    made = core.create_network_connector(
        Name=f"to-{subnet}", ClientToken=subnet, OperatorRole=ROLE, Configuration={"VpcEgressConfiguration": egress}
    )
    until(lambda: core.get_network_connector(Identifier=made["Id"])["State"] == "ACTIVE")
    yield made["Arn"]
    core.delete_network_connector(Identifier=made["Id"])


def test_host_and_neighbours_are_shut_to_a_connector_that_allows_everything(instance: Instance, app: str, outside_world: Outside) -> None:
    """What the link's own filter passes meets the uplink's and the host's: somebody listens at each address."""
    with connected(instance, "subnet-all") as arn:
        vms = [instance.launch(app, egressNetworkConnectors=[arn]) for _ in range(2)]
        try:
            guest = Guest(instance, vms[0])
            for address in (SERVER, NEIGHBOUR):  # the control: what a connector names is reached, also in the host's networks
                assert guest.connect(address)["heard"].endswith("hello")
            with instance.inside(vms[1]["microvmId"], lambda: bound(socket.SOCK_STREAM, ("0.0.0.0", PORT))):
                hosts = set(re.findall(r"inet ([\d.]+)", outside_world.addresses())) - {"127.0.0.1"}
                assert UPLINK in hosts and len(hosts) == 2
                for address in _addresses(instance, vms[1]["microvmId"]) | hosts:
                    error = guest.connect(address)["error"]  # a refusal would be somebody's answer
                    is_there = address in _addresses(instance, vms[1]["microvmId"]) | hosts  # or its link was thrown away meanwhile
                    assert "timed out" in error or not is_there, f"{address}: {error}"
        finally:
            instance.terminate(*(vm["microvmId"] for vm in vms))


def test_a_vpc_connector_is_an_allow_list(instance: Instance, app: str) -> None:
    with connected(instance, "subnet-1") as arn:
        vm = instance.launch(app, egressNetworkConnectors=[arn])
        try:
            guest = Guest(instance, vm)
            assert guest.connect(PRIVATE)["heard"].endswith("hello")
            assert "error" in guest.connect(PRIVATE, PORT + 1)
            assert "error" in guest.connect(SERVER)
        finally:
            instance.terminate(vm["microvmId"])


def test_a_connector_that_names_hosts(instance: Instance, app: str) -> None:
    def said(host: str) -> str:
        return records(hello(server_name(host.encode()))).hex()

    def decisions() -> list[tuple[str, str, str]]:
        lines = instance.command("torpor", "egress", guest.id, "--json").stdout.splitlines()
        return [(one["what"], one["name"], one["verdict"]) for one in map(json.loads, lines)]

    policy = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
    with connected(instance, "subnet-none", "sg-names") as arn:
        vm = instance.launch(app, egressNetworkConnectors=[arn], idlePolicy=policy)
        try:
            guest = Guest(instance, vm)
            for _ in range(2):
                assert guest.get("/resolve?name=example.com") == {"address": SERVER}
                assert guest.get("/resolve?name=example.org")["address"] != SERVER
                answer = guest.connect(SERVER, PORT, hex=said("example.com"))
                assert answer["heard"].startswith(f"{UPLINK} \x16\x03"), "as it was said"
                assert guest.connect(SERVER, PORT, hex=said("example.org")) == {"heard": "\x15\x03\x03\0\x02\x02\x31"}
                assert guest.connect(SERVER, PORT, hex=b"SSH-2.0-x\r\n\r\n".hex())["heard"].startswith("HTTP/1.1 403 ")
                assert "GET / " in guest.connect(SERVER, PORT + 1, hex=b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n".hex())["heard"]
                assert guest.fetch(f"{METADATA}/latest/meta-data/")["status"] == 401
                assert "error" in guest.connect(PRIVATE)
                instance.client().suspend_microvm(microvmIdentifier=guest.id)
                instance.state(guest.id, "SUSPENDED")
            until(lambda: decisions().count(("connection", "example.com", "ended")) == 4)
            found = decisions()
            assert found.count(("connection", "example.com", "allowed")) == 4
            assert found.count(("connection", "example.org", "refused")) == 2
            assert ("name", "example.org", "refused") in found and ("name", "example.com", "allowed") in found
            guest.get("/")  # awake
            instance.kill("control")
            until(lambda: guest.connect(SERVER, PORT, hex=said("example.com")).get("heard", "").startswith(UPLINK), 60)
            assert guest.connect(SERVER, PORT, hex=said("example.org"))["heard"].startswith("\x15")
        finally:
            instance.terminate(vm["microvmId"])


def test_the_way_out_is_there_again_after_a_sleep(instance: Instance, guest: Guest) -> None:
    instance.client().suspend_microvm(microvmIdentifier=guest.id)
    instance.state(guest.id, "SUSPENDED")
    assert guest.connect(SERVER)["heard"].endswith("hello")
    assert guest.get("/resolve?name=example.com") == {"address": SERVER}


# ---- credentials ----


def test_credentials_need_a_token_and_are_the_roles(instance: Instance, guest: Guest) -> None:
    path = f"{METADATA}/latest/meta-data/iam/security-credentials/"
    assert guest.fetch(path)["status"] == 401
    assert guest.fetch(f"{METADATA}/latest/api/token", "PUT")["status"] == 400
    token = guest.fetch(f"{METADATA}/latest/api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")["body"]
    asked = {"X_aws_ec2_metadata_token": token}
    assert guest.fetch(path, **asked) == {"status": 200, "body": "execution_role"}
    made = json.loads(guest.fetch(f"{path}execution_role", **asked)["body"])
    assert set(made) == {"Code", "LastUpdated", "Type", "AccessKeyId", "SecretAccessKey", "Token", "Expiration"}
    lives = time.mktime(time.strptime(made["Expiration"], "%Y-%m-%dT%H:%M:%SZ")) - time.mktime(time.gmtime())
    assert 54 * 60 < lives <= 55 * 60 and made["Code"] == "Success"
    policy = {"Statement": [{"Effect": "Allow", "Action": "lambda:ListMicrovms", "Resource": "*"}]}
    path_of_policy = instance.directory / "policy.json"
    path_of_policy.write_text(json.dumps(policy))
    instance.command("torpor", "role", "put", ROLE, "--policy", str(path_of_policy))
    client = boto3.client(
        "lambda-microvms", region_name="us-east-1", endpoint_url=f"http://127.0.0.1:{instance.environment['TORPOR_API__PORT']}",
        aws_access_key_id=made["AccessKeyId"], aws_secret_access_key=made["SecretAccessKey"], aws_session_token=made["Token"],
    )  # fmt: skip
    assert client.list_microvms()["items"]
    with pytest.raises(client.exceptions.AccessDeniedException):
        client.get_microvm(microvmIdentifier=guest.id)


def test_no_role_no_credentials(instance: Instance, app: str) -> None:
    vm = instance.launch(app)
    try:
        guest = Guest(instance, vm)
        token = guest.fetch(f"{METADATA}/latest/api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")["body"]
        for tail in ("", "execution_role"):
            answer = guest.fetch(f"{METADATA}/latest/meta-data/iam/security-credentials/{tail}", X_aws_ec2_metadata_token=token)
            assert answer["status"] == 404
    finally:
        instance.terminate(vm["microvmId"])


def test_services_are_there_after_control_was_killed(instance: Instance, guest: Guest) -> None:
    instance.kill("control")
    until(lambda: guest.get("/resolve?name=example.com") == {"address": SERVER}, 30)
    assert guest.fetch(f"{METADATA}/latest/meta-data/")["status"] == 401


def test_nothing_of_the_way_out_stays(instance: Instance, app: str) -> None:
    def links() -> set[str]:
        return set(re.findall(r"vm\.\d+", _in_uplink(instance, "ip", "-o", "link")))

    vm = instance.launch(app)
    before = links()
    instance.terminate(vm["microvmId"])
    until(lambda: before - links())


def test_logs_say_nothing_of_credentials(instance: Instance, guest: Guest) -> None:
    token = guest.fetch(f"{METADATA}/latest/api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")["body"]
    made = json.loads(
        guest.fetch(f"{METADATA}/latest/meta-data/iam/security-credentials/execution_role", X_aws_ec2_metadata_token=token)["body"]
    )
    trail = "".join(path.read_text() for path in (instance.root / "control/audit").glob("*/audit.jsonl"))
    assert made["SecretAccessKey"] not in instance.log.read_text() + trail and made["Token"] not in instance.log.read_text() + trail
