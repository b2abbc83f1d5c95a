"""Logs: JSON lines on standard error, or readable text on a terminal."""

from __future__ import annotations

import logging
import os
import sys

import structlog

LEVEL_VARIABLE = "TORPOR_LOG"  # info, warning or error
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


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
            structlog.processors.format_exc_info,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
