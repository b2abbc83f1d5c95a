"""account, key, role, quota, trace, egress: the commands that speak with control's own socket, as root."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import socket
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from gateway import config
from gateway import messages as m
from gateway.rpc import Connection, RpcError

from .client import client, resolve
from .output import fail, line_of, mib, show_json, show_table

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Account = Annotated[str, typer.Option("--account", help="The account's number; the instance's first account by default.")]
_SECONDS = 10.0
_FOLLOW_SECONDS = 0.5
_WORKERS_SECONDS = 30.0  # of edges, which may have to come back first
_EVERYTHING = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}

account = typer.Typer(no_args_is_help=True, help="Accounts: each sees only its own images, microVMs and connectors.")
key = typer.Typer(no_args_is_help=True, help="Access keys of an account's users, with their policies.")
role = typer.Typer(no_args_is_help=True, help="Policies of roles: what a microVM with the role may ask of this API.")


tokens = typer.Typer(no_args_is_help=True, help="Access tokens of endpoints: take them back, change their key.")


def register(app: typer.Typer) -> None:
    app.add_typer(tokens, name="tokens")
    app.add_typer(account, name="account")
    app.add_typer(key, name="key")
    app.add_typer(role, name="role")
    app.command()(quota)
    app.command()(trace)
    app.command()(egress)


def ask(method: str, body: Any = None, kind: Any = None, seconds: float = _SECONDS) -> Any:
    """One call to control; what it refuses is the command's one line of error."""
    if os.geteuid() != 0:
        fail("this needs root: it is the host's operator who asks", 2)
    settings = config.load()
    return asyncio.run(_ask(settings.control_socket, method, body, kind, seconds))


async def _ask(path: Path, method: str, body: Any, kind: Any, seconds: float) -> Any:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(path))
    except OSError:
        fail(f"no service answers at {path}: is `torpor serve` running?", 1)
    connection = Connection(sock)
    try:
        return await connection.call(method, body, kind, timeout=seconds)
    except RpcError as error:
        fail(str(error), 1)
    finally:
        connection.close()


def _read_policy(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        fail(f"{path}: {error.strerror}", 2)


def _show(rows: list[Any], columns: dict[str, str], as_json: bool) -> None:
    """`columns`: heading to member."""
    if as_json:
        show_json([msgspec.to_builtins(row) for row in rows])
    else:
        show_table(columns, [[_cell(getattr(row, member), member) for member in columns.values()] for row in rows])


def _cell(value: Any, member: str) -> str:
    if member == "created_at":
        return datetime.datetime.fromtimestamp(value).strftime("%F %T") if value else ""
    if member == "limit":
        return str(value) if value else "none"
    return str(value)


# ---- tokens ----


@tokens.command("revoke")
def tokens_revoke(
    identifier: Annotated[str, typer.Argument(help="A microVM's id, or the beginning of it; every microVM's tokens by default.")] = "",
    before: Annotated[str, typer.Option(help="Only those minted before this moment (ISO 8601); now by default.")] = "",
) -> None:
    """Refuse tokens that were minted until now, of one microVM or of all. Requests that are under way, and open streams, go on.

    Example: torpor tokens revoke microvm-1f0c…
    """
    try:
        moment = datetime.datetime.fromisoformat(before).astimezone().timestamp() if before else 0.0
    except ValueError:
        fail(f"{before} is no moment: write it as 2026-11-28T12:00:00+00:00", 2)
    at = ask("tokens_revoke", m.RevokeRequest(resolve(identifier) if identifier else "", moment), float, _WORKERS_SECONDS)
    print(f"tokens minted before {datetime.datetime.fromtimestamp(at).astimezone().isoformat(timespec='seconds')} are refused")


@tokens.command("rotate")
def tokens_rotate() -> None:
    """Make a new key for tokens. Those that the old one has signed stay valid until they expire.

    Example: torpor tokens rotate
    """
    ask("tokens_rotate", seconds=_WORKERS_SECONDS)


# ---- accounts ----


@account.command("create")
def account_create(
    name: Annotated[str, typer.Argument(help="What people call it.")],
    number: Annotated[str, typer.Option(help="Twelve digits; made up by default.")] = "",
    as_json: Json = False,
) -> None:
    """Make an account. Give it a key next.

    Example: torpor account create team-blue
    """
    made = ask("account_create", m.AccountName(name, number), m.AccountFacts)
    show_json(msgspec.to_builtins(made)) if as_json else print(made.account)


@account.command("ls")
def account_ls(as_json: Json = False) -> None:
    """List accounts.

    Example: torpor account ls
    """
    _show(ask("accounts", None, list[m.AccountFacts]), {"ACCOUNT": "account", "NAME": "name", "CREATED": "created_at"}, as_json)


@account.command("rm")
def account_rm(number: Annotated[str, typer.Argument(help="The account's number.")]) -> None:
    """Delete an account that has nothing left, with its keys and roles.

    Example: torpor account rm 210987654321
    """
    ask("account_delete", m.AccountName("", number))


# ---- keys ----


@key.command("create")
def key_create(
    user: Annotated[str, typer.Argument(help="The user's name, as policies and the audit trail have it.")],
    number: Account = "",
    policy: Annotated[Path | None, typer.Option(help="A file with an IAM policy: what the user may do. Without it, nothing.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="The user may do everything in the account.")] = False,
    as_json: Json = False,
) -> None:
    """Make an access key. Its secret is shown once.

    Example: torpor key create ci --policy config/examples/policies/developer.json
    """
    if admin and policy is not None:
        fail("--admin and --policy exclude each other", 2)
    document = json.dumps(_EVERYTHING) if admin else _read_policy(policy)
    made = ask("key_create", m.KeyRequest(number, user, document), m.KeyFacts)
    if as_json:
        show_json(msgspec.to_builtins(made))
    else:
        print(f"AWS_ACCESS_KEY_ID={made.key}\nAWS_SECRET_ACCESS_KEY={made.secret}")


@key.command("ls")
def key_ls(as_json: Json = False) -> None:
    """List access keys, without their secrets.

    Example: torpor key ls --json
    """
    columns = {"KEY": "key", "ACCOUNT": "account", "USER": "user", "CREATED": "created_at", "POLICY": "policy"}
    _show(ask("keys", None, list[m.KeyFacts]), columns, as_json)


@key.command("rm")
def key_rm(identifier: Annotated[str, typer.Argument(metavar="KEY", help="The access key's id.")]) -> None:
    """Delete an access key; it is refused from now on.

    Example: torpor key rm AKIAEXAMPLE
    """
    ask("key_delete", m.KeyName(identifier))


# ---- roles ----


@role.command("put")
def role_put(
    arn: Annotated[str, typer.Argument(help="arn:aws:iam::<account>:role/<name>.")],
    policy: Annotated[Path, typer.Option(help="A file with an IAM policy.")],
) -> None:
    """Say what microVMs with a role may ask of this API. Without it they may ask nothing.

    Example: torpor role put arn:aws:iam::123456789012:role/worker --policy worker.json
    """
    ask("role_put", m.RoleFacts(arn, _read_policy(policy)))


@role.command("ls")
def role_ls(as_json: Json = False) -> None:
    """List roles that have a policy.

    Example: torpor role ls
    """
    _show(ask("roles", None, list[m.RoleFacts]), {"ROLE": "arn", "POLICY": "policy"}, as_json)


@role.command("rm")
def role_rm(arn: Annotated[str, typer.Argument(help="The role's ARN.")]) -> None:
    """Take a role's policy away.

    Example: torpor role rm arn:aws:iam::123456789012:role/worker
    """
    ask("role_delete", m.RoleFacts(arn, ""))


def quota(as_json: Json = False) -> None:
    """Show each account's use of its quotas (limits.profile says which they are).

    Example: torpor quota
    """
    columns = {"ACCOUNT": "account", "QUOTA": "what", "USED": "used", "LIMIT": "limit"}
    _show(ask("quota", None, list[m.QuotaUse]), columns, as_json)


def tiers() -> dict[str, str]:
    """Returns where each sleeping microVM is, and what it takes there, as text; nothing where the host cannot be asked."""
    if os.geteuid() != 0 or not config.load().control_socket.exists():
        return {}
    found = ask("tiers", None, dict[str, m.Tier])
    return {session: f"{kept.tier}, {mib(kept.stored_bytes)}" for session, kept in found.items()}


def microvm_log(identifier: str, after: int) -> m.MicrovmLog | None:
    """Returns the service's own lines about a microVM, from number `after` on; None where the host cannot be asked."""
    if os.geteuid() != 0 or not config.load().control_socket.exists():
        return None
    found: m.MicrovmLog = ask("microvm_log", m.LogRequest(identifier, after), m.MicrovmLog)
    return found


def egress(
    identifier: Annotated[str, typer.Argument(metavar="ID", help="The microVM's id, or the beginning of it.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until it is TERMINATED.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the lines as they are kept, JSON each.")] = False,
) -> None:
    """Print what a microVM with an allow-list wanted to reach, and what became of it.

    Example: torpor egress 3f2a -f
    """
    name, after = resolve(identifier), 0
    while True:
        lines: list[str] = ask("egress_log", m.EgressLogRequest(name, after), list[str])
        for line in lines:
            found = json.loads(line)
            after = found["order"]
            print(line_of(line if as_json else _decision(found)), flush=True)
        if not lines:
            if not follow or client().get_microvm(microvmIdentifier=name)["state"] == "TERMINATED":
                return
            time.sleep(_FOLLOW_SECONDS)


def _decision(found: dict[str, Any]) -> str:
    where = f"{found['address']}:{found['port']}" if "port" in found else found["address"]
    parts = [found["time"], found["verdict"], found["what"], found["name"] or "-", where or "-"]
    if found["verdict"] == "ended":
        parts.append(f"sent {found['sent']} received {found['received']}")
    if found["reason"]:
        parts.append(f"({found['reason']})")
    if found["untold"]:
        parts.append(f"[{found['untold']} lines before this one were not kept]")
    return " ".join(parts)


def trace(
    identifier: Annotated[str, typer.Argument(metavar="ID", help="The microVM's id, or the beginning of it.")], as_json: Json = False
) -> None:
    """Show where the time of a microVM's last launch or resume, and of its last suspend, went.

    Example: torpor trace 3f2a
    """
    found = ask("traces", m.SessionName(resolve(identifier)), list[m.Trace])
    if as_json:
        show_json([msgspec.to_builtins(trace) for trace in found])
        return
    rows = []
    for trace in sorted(found, key=lambda trace: trace.started_at):
        total = sum(step.took_ms for step in trace.steps)
        rows.append((trace.work, trace.steps[0].where if trace.steps else "", "in all", f"{total:.1f}"))
        rows += [("", step.where, step.what, f"{step.took_ms:.1f}") for step in trace.steps]
    show_table(("WORK", "PROCESS", "STEP", "MS"), rows)
