"""Structured logs on standard error, for structlog and for the standard library's loggers."""

import json
import logging
import os
import re
import sys
from collections.abc import MutableMapping
from math import isfinite
from typing import Any, TextIO

import structlog

from config.terminal import escaped_json

# Characters of one value: an error that quotes a large message must not fill the log.
_VALUE_MAX = 10_000
# Characters kept from the end of an exception: its last line has the error.
_TRACE_TAIL = 4_000
# JSON readers use doubles, and Python refuses to print integers of thousands of digits.
_INT_MAX = 2**63
# libpq also accepts a password as a parameter.
_PARAMETER = re.compile(r"(?P<name>\b(?:ssl)?password=)[^\s&]*", re.IGNORECASE)
_WORD = re.compile(r"\S+")

# Library loggers that log in many lines an event that the worker logs in one.
_NOISY = ("aio_pika", "aiormq", "alembic", "sqlalchemy", "uvicorn", "asyncio")

Record = MutableMapping[str, Any]


def configure_logs(level: str, log_format: str) -> None:
    """Log records of *level* and above as JSON lines (``json``) or in a human-readable form (``console``)."""
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
            _fill_in,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = _Handler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            # First, so that a library's extra fields cannot replace the level or the time.
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
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
    # aiormq logs as an error each close that the worker handles and logs itself.
    logging.getLogger("aiormq.connection").setLevel(logging.CRITICAL)
    # Log warnings too; otherwise they reach the terminal unformatted.
    logging.captureWarnings(capture=True)


def tidy(_logger: object, _method: str, record: Record) -> Record:
    """Mask the password of every URL in *record* and shorten long values; never raises."""
    for name, value in record.items():
        if value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) < _INT_MAX):
            continue
        if isinstance(value, float) and isfinite(value):
            continue
        text = value if isinstance(value, str) else _as_text(value)
        safe = _safe(text, tail=_TRACE_TAIL if name == "exception" else 0)
        # Half of a surrogate pair cannot be written to a terminal or file.
        record[name] = safe.encode("utf-8", "backslashreplace").decode()
    return record


def _safe(text: str, *, tail: int) -> str:
    """Return *text* without passwords; a long text is cut to its start and its last *tail* characters."""
    # Cut after a possible URL password, so that no part of one remains at the end.
    head = _without_passwords(text[: 2 * _VALUE_MAX])
    if len(text) <= _VALUE_MAX:
        return head
    safe = head[: _VALUE_MAX - tail] + f"… ({len(text)} characters)"
    if not tail:
        return safe
    # As above, at the start: the first word may be part of a password.
    end = _WORD.sub("", text[-2 * _VALUE_MAX :], count=1)
    return f"{safe}\n…{_without_passwords(end)[-tail:]}"


def _without_passwords(text: str) -> str:
    return _PARAMETER.sub(r"\g<name>***", _WORD.sub(_masked, text))


def _masked(word: re.Match[str]) -> str:
    """Mask a URL's password up to the last @ of the word, because a password may contain one. Runs in linear time."""
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


class _Handler(logging.StreamHandler[TextIO]):
    """Formats library records even if their arguments do not fit; logging would print them raw."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr  # not the one of configure_logs: a caller may have replaced and closed it since
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        if hasattr(record, "_logger"):  # structlog's: its message is the complete record
            return super().format(record)
        copy = logging.makeLogRecord(record.__dict__)  # other handlers use the original
        copy.msg, copy.args = _filled_in(record.msg, record.args), None
        return super().format(copy)


def _fill_in(_logger: object, _method: str, record: Record) -> Record:
    """Put the positional arguments into the event, as the standard library does."""
    args = record.pop("positional_args", ())
    if args:
        one = args[0] if len(args) == 1 and isinstance(args[0], dict) else None
        record["event"] = _filled_in(record.get("event"), one or args)
    return record


def _filled_in(message: object, args: object) -> str:
    text = _as_text(message)
    try:
        return text % args if args else text
    except Exception:  # noqa: BLE001 - whatever an argument's own code raises must not cost the record
        return f"{text} {_as_text(args)}"


def _renderer(log_format: str) -> structlog.types.Processor:
    if log_format == "console":
        colors = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        return structlog.dev.ConsoleRenderer(colors=colors)
    return structlog.processors.JSONRenderer(_as_json)


def _as_json(record: object, **options: Any) -> str:  # noqa: ANN401 - json.dumps's options, which structlog passes
    return escaped_json(json.dumps(record, ensure_ascii=False, **options))
