"""Structured logs on standard error: structlog in front, the standard library's loggers through the same door."""

import logging
import os
import re
import sys
from collections.abc import MutableMapping
from math import isfinite
from typing import Any

import structlog

# Characters of one value. An error that quotes a message of a megabyte must not fill the log with it.
_VALUE_MAX = 10_000
# JSON's readers take a number for a double; Python refuses to print one of thousands of digits.
_INT_MAX = 2**63
# libpq takes a password as a parameter, too.
_PARAMETER = re.compile(r"(?P<name>\b(?:ssl)?password=)[^\s&]*", re.IGNORECASE)
_WORD = re.compile(r"\S+")

# Loggers of libraries that say in many lines what the worker says in one.
_NOISY = ("aio_pika", "aiormq", "alembic", "sqlalchemy", "uvicorn", "asyncio")

Record = MutableMapping[str, Any]


def configure_logs(level: str, log_format: str) -> None:
    """Log records of *level* and above as JSON lines (``json``) or for people (``console``)."""
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                tidy,
                _renderer(log_format),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    # aiormq reports as an error each close that the worker handles, and says itself in words.
    logging.getLogger("aiormq.connection").setLevel(logging.CRITICAL)
    # Warnings become records too; without this they reach the terminal unformatted.
    logging.captureWarnings(capture=True)


def tidy(_logger: object, _method: str, record: Record) -> Record:
    """Mask the password of every URL in *record* and shorten what is too long; never raises."""
    for name, value in record.items():
        if value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) < _INT_MAX):
            continue
        if isinstance(value, float) and isfinite(value):
            continue
        text = value if isinstance(value, str) else _as_text(value)
        # Cut behind what can be a URL's password, so that no half of one is left at the end.
        shown = _PARAMETER.sub(r"\g<name>***", _WORD.sub(_masked, text[: 2 * _VALUE_MAX]))
        if len(text) > _VALUE_MAX:
            shown = shown[:_VALUE_MAX] + f"… ({len(text)} characters)"
        # Half of a surrogate pair cannot be written to any terminal or file.
        record[name] = shown.encode("utf-8", "backslashreplace").decode()
    return record


def _masked(word: re.Match[str]) -> str:
    """Mask a URL's password, up to the word's last @, for a password may hold one. Linear: no pattern backtracks."""
    text = word.group()
    start, end = text.find("://"), text.rfind("@")
    colon = text.find(":", start + 3, end) if 0 <= start < end else -1
    return text if colon < 0 else f"{text[:colon]}:***{text[end:]}"


def _as_text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, int):
        return hex(value)  # unlike str, it has no limit
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001 - a value that cannot be printed must not cost the record
        return f"<{type(value).__name__} that cannot be printed: {type(error).__name__}>"


def _renderer(log_format: str) -> structlog.types.Processor:
    if log_format == "console":
        colors = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        return structlog.dev.ConsoleRenderer(colors=colors)
    return structlog.processors.JSONRenderer(ensure_ascii=False)
