"""Structured logs on standard error: structlog in front, the standard library's loggers through the same door."""

import logging
import os
import re
import sys
from collections.abc import MutableMapping
from math import isfinite
from typing import Any, TextIO

import structlog

# Characters of one value. An error that quotes a message of a megabyte must not fill the log with it.
_VALUE_MAX = 10_000
# Characters of an exception's end that are kept: its last line says what went wrong.
_TRACE_TAIL = 4_000
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
            # First, so that no library's extra can stand in for the level or the time.
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
        shown = _shown(text, tail=_TRACE_TAIL if name == "exception" else 0)
        # Half of a surrogate pair cannot be written to any terminal or file.
        record[name] = shown.encode("utf-8", "backslashreplace").decode()
    return record


def _shown(text: str, *, tail: int) -> str:
    """Return *text* without passwords; of a long one its beginning, and the last *tail* characters."""
    # Cut behind what can be a URL's password, so that no half of one is left at the end.
    head = _without_passwords(text[: 2 * _VALUE_MAX])
    if len(text) <= _VALUE_MAX:
        return head
    shown = head[: _VALUE_MAX - tail] + f"… ({len(text)} characters)"
    if not tail:
        return shown
    # As above, from the other side: the first word of what is looked at may be half of one.
    end = _WORD.sub("", text[-2 * _VALUE_MAX :], count=1)
    return f"{shown}\n…{_without_passwords(end)[-tail:]}"


def _without_passwords(text: str) -> str:
    return _PARAMETER.sub(r"\g<name>***", _WORD.sub(_masked, text))


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


class _Handler(logging.StreamHandler[TextIO]):
    """Writes other libraries' records even where their arguments do not fit; logging itself would print them raw."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr  # not the one of configure_logs: a caller may have replaced and closed it since
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        if hasattr(record, "_logger"):  # structlog's: its message is the whole record still
            return super().format(record)
        whole = logging.makeLogRecord(record.__dict__)  # other handlers have the original
        whole.msg, whole.args = _filled_in(record.msg, record.args), None
        return super().format(whole)


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
    return structlog.processors.JSONRenderer(ensure_ascii=False)
