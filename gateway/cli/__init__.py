"""The `torpor` command: a client of the public API, and `serve`, `env`, `doctor` for the host."""

from __future__ import annotations

import sys

import botocore.exceptions
import typer

from gateway.config import ConfigError

from . import admin, backup, connectors, host, images, microvms, quarantine, shell
from .output import fail

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Torpor: a self-hosted AWS Lambda MicroVMs. Exit codes: 0 done, 1 failed, 2 wrong use, 3 not found, 4 refused.",
)  # fmt: skip
host.register(app)
images.register(app)
microvms.register(app)
shell.register(app)
connectors.register(app)
admin.register(app)
quarantine.register(app)
backup.register(app)

_CODES = {"ResourceNotFoundException": 3, "AccessDeniedException": 4, "ThrottlingException": 4, "ServiceQuotaExceededException": 4}


def main() -> None:
    """Every failure is one line on standard error and an exit code."""
    try:
        app()
    except botocore.exceptions.ClientError as error:
        kind = error.response["Error"]["Code"]
        fail(f"{error.response['Error'].get('Message') or kind} ({kind})", _CODES.get(kind, 1))
    except botocore.exceptions.EndpointConnectionError as error:
        fail(f"no service answers at {error.kwargs.get('endpoint_url')}: is `torpor serve` running?", 1)
    except (botocore.exceptions.BotoCoreError, ConfigError, OSError) as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        sys.exit(130)
