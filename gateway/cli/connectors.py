"""connector, tag: the commands for network connectors and tags."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

import typer

from .client import client, image_arn, role_arn
from .output import fail, show_json, show_table

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
connector = typer.Typer(no_args_is_help=True, help="Network connectors: named lists of what microVMs may reach.")
tag = typer.Typer(no_args_is_help=True, help="Tags of images and connectors.")


def register(app: typer.Typer) -> None:
    app.add_typer(connector, name="connector")
    app.add_typer(tag, name="tag")


@connector.command("create")
def create(
    name: Annotated[str, typer.Argument(help="The connector's name.")],
    subnet: Annotated[list[str], typer.Option(help="A subnet of egress.subnets in torpor.toml; may be given again.")],
    group: Annotated[list[str] | None, typer.Option(help="A group of egress.security_groups; may be given again.")] = None,
    role: Annotated[str, typer.Option(help="The operator role's name.")] = "torpor-connector",
) -> None:
    """Make a VPC_EGRESS connector from networks and ports of the configuration.

    Example: torpor connector create database --subnet subnet-db --group sg-postgres
    """
    egress: dict[str, Any] = {
        "SubnetIds": subnet, "SecurityGroupIds": group or [], "NetworkProtocol": "IPv4", "AssociatedComputeResourceTypes": ["MicroVm"],
    }  # fmt: skip
    made = client("lambda-core").create_network_connector(
        Name=name, Configuration={"VpcEgressConfiguration": egress}, OperatorRole=role_arn(role), ClientToken=str(uuid.uuid4())
    )
    print(made["Arn"])


@connector.command("ls")
def ls(as_json: Json = False) -> None:
    """List the account's connectors.

    Example: torpor connector ls
    """
    pages = client("lambda-core").get_paginator("list_network_connectors").paginate()
    found = [item for page in pages for item in page["NetworkConnectors"]]
    if as_json:
        show_json(found)
    else:
        show_table(("NAME", "STATE", "ARN"), [(connector["Name"], connector["State"], connector["Arn"]) for connector in found])


@connector.command("rm")
def rm(name: Annotated[str, typer.Argument(help="Name, id or ARN.")]) -> None:
    """Delete a connector that no microVM uses.

    Example: torpor connector rm database
    """
    client("lambda-core").delete_network_connector(Identifier=name)


def _resource(text: str) -> str:
    return text if text.startswith("arn:") else image_arn(text)


@tag.command("set")
def tag_set(
    resource: Annotated[str, typer.Argument(help="An image's name, or an ARN.")],
    tags: Annotated[list[str], typer.Argument(help="name=value, one or more.")],
) -> None:
    """Set tags.

    Example: torpor tag set flask team=blue
    """
    pairs = dict(tag.partition("=")[::2] for tag in tags)
    if not all("=" in tag for tag in tags):
        fail("tags have the form name=value", 2)
    client().tag_resource(Resource=_resource(resource), Tags=pairs)


@tag.command("ls")
def tag_ls(resource: Annotated[str, typer.Argument(help="An image's name, or an ARN.")], as_json: Json = False) -> None:
    """List a resource's tags.

    Example: torpor tag ls flask
    """
    tags = client().list_tags(Resource=_resource(resource))["Tags"]
    if as_json:
        show_json(tags)
    else:
        show_table(("TAG", "VALUE"), sorted(tags.items()))


@tag.command("rm")
def tag_rm(
    resource: Annotated[str, typer.Argument(help="An image's name, or an ARN.")],
    names: Annotated[list[str], typer.Argument(help="Names of tags.")],
) -> None:
    """Take tags away.

    Example: torpor tag rm flask team
    """
    client().untag_resource(Resource=_resource(resource), TagKeys=names)
