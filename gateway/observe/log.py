"""Logs: JSON lines on standard error, or readable text on a terminal."""

from __future__ import annotations

import errno
import logging
import os
import sys

import structlog
from structlog.typing import EventDict, WrappedLogger

LEVEL_VARIABLE = "TORPOR_LOG"  # info, warning or error
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# Of the host, which has no more of something, or whose disk refuses.
_TROUBLES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EIO)


def configure(process: str) -> None:
    """Every line carries the process's name, the time in UTC, and the event's fields."""
    level = _LEVELS.get(os.environ.get(LEVEL_VARIABLE, "info").lower(), logging.INFO)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # garbage on a port is no news
    # Tracebacks without local variables: those hold tokens.
    render = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            host_trouble_in_one_line,
            structlog.processors.format_exc_info,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)


def host_trouble_in_one_line(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """A processor: a trouble of the host is told by its text. A traceback would only say where it was met first."""
    given = event.get("exc_info")
    error = given if isinstance(given, BaseException) else given[1] if isinstance(given, tuple) else sys.exc_info()[1] if given else None
    if isinstance(error, OSError) and error.errno in _TROUBLES:
        del event["exc_info"]
        event["error"] = str(error)
    return event
