"""From a container image's configuration to what the guest's agent starts (OCI image-spec, config.md)."""

from __future__ import annotations

import json
import re
import signal
from typing import Any


class ContainerError(Exception):
    """The container image cannot be started; the text says why."""


def parse_config(text: str) -> dict[str, Any]:
    """Returns the runtime part of a container image's configuration, as Docker's `image inspect` has it under `Config`. Labels tell a guest
    nothing, and may be large."""
    config = dict(json.loads(text))
    config.pop("Labels", None)
    config["Env"] = list(config.get("Env") or [])
    if not (config.get("Entrypoint") or config.get("Cmd")):
        raise ContainerError("the Dockerfile sets neither ENTRYPOINT nor CMD: there is nothing to start")
    return config


def stop_signal(config: dict[str, Any]) -> int:
    """Returns the number of STOPSIGNAL, which is given by name or number; SIGTERM where there is none, or none that Linux has."""
    text = str(config.get("StopSignal") or "").upper().removeprefix("SIG")
    relative = re.fullmatch(r"RT(MIN|MAX)(?:([+-])(\d+))?", text)
    if relative is not None:  # glibc's range, whatever library this process has
        start, sign, offset = relative.groups()
        number = (34 if start == "MIN" else 64) + int(f"{sign or '+'}{offset or 0}")
    elif text.isdecimal():
        number = int(text)
    else:
        number = getattr(signal, f"SIG{text}", signal.SIGTERM)
    return int(number) if 1 <= number <= 64 else signal.SIGTERM


def exposed_ports(config: dict[str, Any]) -> list[int]:
    ports = []
    for entry in config.get("ExposedPorts") or {}:
        number, _, protocol = entry.partition("/")
        if number.isascii() and number.isdigit() and protocol in ("", "tcp"):
            ports.append(int(number))
    return sorted(ports)


def agent_entries(
    config: dict[str, Any], variables: dict[str, str], reserved: dict[str, str], all_capabilities: bool
) -> list[tuple[str, str]]:
    """Returns the agent's configuration. The image's variables win over the container's, ours over both."""
    environment = dict(entry.partition("=")[::2] for entry in config["Env"])
    environment |= variables | reserved
    entries = [("arg", word) for word in [*(config.get("Entrypoint") or []), *(config.get("Cmd") or [])]]
    entries += [("env", f"{name}={value}") for name, value in environment.items()]
    entries += [("volume", path) for path in config.get("Volumes") or {}]
    entries += [("user", config.get("User") or ""), ("dir", f"/{(config.get('WorkingDir') or '').lstrip('/')}")]
    entries.append(("stop", str(int(stop_signal(config)))))
    if all_capabilities:
        entries.append(("capabilities", "all"))
    return entries


def reserved_variables(arn: str, name: str, version: str, region: str) -> dict[str, str]:
    """Set by the service in every microVM (service reference, section 6)."""
    return {
        "AWS_LAMBDA_MICROVM_IMAGE_ARN": arn,
        "AWS_LAMBDA_MICROVM_IMAGE_NAME": name,
        "AWS_LAMBDA_MICROVM_IMAGE_VERSION": version,
        "AWS_REGION": region,
    }
