"""Log records are JSON lines on standard error, without passwords, whatever is logged."""

import json
import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.logs import tidy

PROLOGUE = """
import logging, sys, warnings
import structlog
from config.logs import configure_logs
configure_logs({level!r}, {log_format!r})
log = structlog.get_logger("closeout.test")
"""
# Seconds that one record may take, whatever is in it.
RECORD_SECONDS = 1.0


def stderr_of(program: str, *, level: str = "INFO", log_format: str = "json") -> str:
    text = PROLOGUE.format(level=level, log_format=log_format) + program
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, timeout=30, check=True)
    assert done.stdout == b""
    return done.stderr.decode()


def records(program: str, *, level: str = "INFO") -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in stderr_of(program, level=level).splitlines()]


def tidied(value: object) -> Any:
    return tidy(None, "info", {"value": value})["value"]


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no")


def test_a_record_is_one_json_line_on_standard_error_with_level_logger_and_time():
    (record,) = records('log.info("closed out", runs=3, tenant="acme\\nx")')
    time = record.pop("timestamp")
    assert record == {
        "event": "closed out",
        "level": "info",
        "logger": "closeout.test",
        "runs": 3,
        "tenant": "acme\nx",
    }
    assert time.endswith("Z")


def test_records_below_the_level_are_not_written():
    program = 'log.info("a"); log.warning("b"); logging.getLogger("x").info("c"); logging.getLogger("x").error("d")'
    assert [record["event"] for record in records(program, level="WARNING")] == ["b", "d"]
    assert [record["event"] for record in records('log.debug("a")', level="DEBUG")] == ["a"]


def test_records_of_the_standard_library_have_the_same_format():
    program = """
logging.getLogger("library").warning("to %s", "amqp://u:hunter2@h/v", extra={"port": 5672})
logging.getLogger("aiormq").info("chatter")
logging.getLogger("sqlalchemy.engine").info("chatter")
logging.getLogger("aiormq.connection").error("closed")
logging.getLogger("uvicorn.error").warning("kept")
warnings.warn("careful", UserWarning, stacklevel=1)
"""
    found = records(program)
    assert [record["logger"] for record in found] == ["library", "uvicorn.error", "py.warnings"]
    assert found[0]["event"] == "to amqp://u:***@h/v"
    assert found[0]["port"] == 5672
    assert "careful" in found[2]["event"]


def test_bound_context_is_in_every_record():
    program = """
structlog.contextvars.bind_contextvars(run_id="r-1", tenant_id="acme", phase="COMMITTED")
log.info("ours")
logging.getLogger("library").info("theirs")
"""
    for record in records(program):
        assert (record["run_id"], record["tenant_id"], record["phase"]) == ("r-1", "acme", "COMMITTED")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_arguments_that_do_not_fit_the_text_are_logged_without_passwords(log_format: str):
    program = """
class Unprintable:
    def __str__(self): raise RuntimeError("no")
    __repr__ = __str__
for info in (log.info, logging.getLogger("library").info):
    info("%d items", "amqp://u:hunter@h")
    info("too many", "amqp://u:hunter@h", 2)
    info("%s is odd", Unprintable())
    info("%(name)s by name", {"name": "called"})
    info("100%")
    info(Unprintable())
    info(b"amqp://u:hunter@h/\\xff")
"""
    written = stderr_of(program, log_format=log_format)
    assert len(written.splitlines()) == 14
    assert "hunter" not in written
    for words in ("%d items", "too many", "%s is odd", "called by name", "100%", "amqp://u:***@h/"):
        assert written.count(words) >= 2


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_extra_fields_of_a_library_cannot_replace_the_level_or_the_time(log_format: str):
    program = 'logging.getLogger("library").info("theirs", extra={"level": 3, "timestamp": 4, "logger": 5})'
    (line,) = stderr_of(program, log_format=log_format).splitlines()
    assert "info" in line
    assert "library" in line


def test_a_long_exception_keeps_its_last_line():
    found = records("""
try:
    raise RuntimeError("amqp://u:hunter@h " + "x" * 30_000) from ValueError("y " * 30_000)
except RuntimeError as error:
    try:
        raise OSError("the reason: amqp://u:hunter@h") from error
    except OSError:
        log.exception("lost")
""")
    text = found[0]["exception"]
    assert text.endswith("OSError: the reason: amqp://u:***@h")
    assert text.startswith("ValueError: y y")
    assert len(text) < 10_100
    assert "hunter" not in text


def test_a_password_after_the_cut_of_a_long_exception_is_masked():
    for after in (*range(3_970, 4_005), *range(19_970, 20_005)):
        record = {"exception": "." * 20_000 + " amqp://u:hunter@h " + "." * after}
        text = tidy(None, "error", record)["exception"]
        assert not re.search("hunter|unter|nter@|ter@|er@|r@h", text)


def test_passwords_are_masked_in_exception_text_and_in_its_causes():
    program = """
url = "postgresql://worker:hunter2@db/closeout"
try:
    try:
        raise OSError(f"cannot reach {url}")
    except OSError as error:
        raise RuntimeError("amqp://worker:hunter3@mq") from error
except RuntimeError:
    log.exception("lost")
    logging.getLogger("library").exception("lost too")
    log.error("failed", why=RuntimeError(url), also=[url, {"deep": url}], raw=url.encode())
"""
    found = records(program)
    assert len(found) == 3
    for record in found[:2]:
        assert "Traceback" in record["exception"]
        assert "postgresql://worker:***@db/closeout" in record["exception"]
        assert "amqp://worker:***@mq" in record["exception"]
    assert "hunter" not in json.dumps(found)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("amqp://u:hunter@h/v", "amqp://u:***@h/v"),
        ("AMQPS://u:hunter@h", "AMQPS://u:***@h"),
        ("postgresql+asyncpg://u:hunter@h", "postgresql+asyncpg://u:***@h"),
        ("redis://:hunter@h", "redis://:***@h"),
        ("amqp://u:hun:ter/hunter?#@h", "amqp://u:***@h"),
        ("amqp://u:hunt%40er@h", "amqp://u:***@h"),
        ("a amqp://u:hunter@h, b amqp://v:hunter@i", "a amqp://u:***@h, b amqp://v:***@i"),
        ("('amqp://u:hunter@h',)", "('amqp://u:***@h',)"),
        ("http://host:8080/path", "http://host:8080/path"),
        ("mail me: a@b", "mail me: a@b"),
        ("amqp://u@h", "amqp://u@h"),
    ],
)
def test_the_password_of_a_url_is_masked_anywhere_in_a_text(text: str, masked: str):
    assert tidied(text) == masked
    assert tidied(text.encode()) == masked
    assert tidied(RuntimeError(text)) == masked


@pytest.mark.parametrize(
    "text",
    [
        "amqp://u:hunter@hunter@h",
        "postgresql://h/d?user=u&password=hunter",
        "postgresql://h/d?sslpassword=hunter&sslmode=require",
        "amqp://u:" + "hunter" * 200 + "@h",  # a JWT, as RabbitMQ's OAuth 2 takes it
        "amqp://" + "u" * 300 + ":hunter@h",
    ],
    ids=lambda text: text[:40],
)
def test_a_password_is_masked_in_unusual_urls(text: str):
    assert "hunter" not in tidied(text)


def test_a_password_at_the_cut_of_a_long_text_is_masked():
    for before in range(9_970, 10_005):
        assert "hunter" not in tidied("." * before + " amqp://u:hunter@h " + "." * 5_000)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"\xff\x00a", "\\xff\x00a"),
        ("\ud800", "\\ud800"),
        (Unprintable(), "<Unprintable that cannot be printed: RuntimeError>"),
        ([1, "a"], "[1, 'a']"),
        (None, None),
        (True, True),
        (5, 5),
        (0.5, 0.5),
        ("", ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_unusual_value_is_logged_as_valid_text(value: object, text: object):
    assert tidied(value) == text


def test_a_long_value_is_cut_with_a_note_of_its_length():
    assert tidied("x" * 10_000) == "x" * 10_000
    assert tidied("x" * 10_001) == "x" * 10_000 + "… (10001 characters)"
    assert tidied(b"x" * 1_000_000) == "x" * 10_000 + "… (1000000 characters)"


def test_a_record_of_a_megabyte_is_tidied_in_linear_time():
    units = [
        "a",
        ".",
        "a://",
        "://a:",
        "a://b:c",
        "://",
        "a:",
        "@",
        "a://" + ":" * 50,
        "\ud800",
        "ä ",
        "password=",
        "?&=",
    ]
    # In a separate process: a slow pattern cannot be interrupted.
    program = f"""
from time import process_time
from config.logs import tidy
for unit in {units!r}:
    text = unit * (1_048_576 // len(unit))
    started = process_time()
    print(ascii(unit), flush=True)
    tidy(None, "info", {{"value": text}})
    assert process_time() - started < {RECORD_SECONDS}, unit
print("done")
"""
    done = subprocess.run(
        ["timeout", "60", sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["done"]


ODD = """
class Unprintable:
    def __str__(self): raise RuntimeError("no")
    __repr__ = __str__
class Hostile(Exception):
    def __str__(self): raise RuntimeError("no")
"""
ODD_VALUES = [
    'b"\\xff"', '"\\ud800"', "Unprintable()", "Hostile()", "10**5000", "-10**5000",
    'float("nan")', 'float("-inf")', "1j",
    "{Unprintable(): 1}", "[Unprintable()]", '"x" * 1_000_000', '"\\x00\\x1b[31m"', '{"a": {1, 2}}', "object", "...",
]  # fmt: skip


@pytest.fixture(scope="module")
def odd_lines() -> list[str]:
    """The output when every odd value is logged, through both logging APIs, in one process."""
    program = "".join(
        f'log.info("ours", number={number}, value={value})\n'
        f'logging.getLogger("library").info("theirs", extra={{"number": {number}, "value": {value}}})\n'
        for number, value in enumerate(ODD_VALUES)
    )
    return stderr_of(ODD + program).splitlines()


@pytest.mark.parametrize(("number", "value"), list(enumerate(ODD_VALUES)), ids=ODD_VALUES)
def test_any_value_is_logged_as_one_line_of_json(odd_lines: list[str], number: int, value: str):
    found = [
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        for line in odd_lines
        if line.startswith("{") and f'"number": {number},' in line
    ]
    assert sorted(record["event"] for record in found) == ["ours", "theirs"]


def test_the_logging_module_reports_no_error(odd_lines: list[str]):
    assert [line for line in odd_lines if line == "--- Logging error ---"] == []


def test_an_unprintable_exception_and_an_invalid_logger_name_are_still_logged():
    program = """
try:
    raise Hostile
except Hostile:
    log.exception("hostile")
log.info("\\ud800 event", **{"\\ud800": 1})
log.info("last")
"""
    found = records(ODD + program)
    assert [record["event"] for record in found] == ["hostile", "\\ud800 event", "last"]
    assert "Hostile" in found[0]["exception"]


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=30)
    | st.binary(max_size=30)
    | st.sampled_from(["amqp://u:hunter@h", "://", "@", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, database=None)
@given(st.dictionaries(st.text(min_size=1, max_size=10), _VALUES, max_size=4))
def test_any_tidied_record_can_be_encoded_as_utf_8(record: dict[str, Any]):
    names = set(record)
    made = tidy(None, "info", record)
    assert set(made) == names
    for value in made.values():
        assert isinstance(value, bool | int | float | str | None)
        if isinstance(value, str):
            value.encode()
            assert "hunter" not in value


def on_a_terminal(program: str, **variables: str) -> bytes:
    leader, follower = pty.openpty()
    environ = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR"}}
    text = PROLOGUE.format(level="INFO", log_format="console") + program
    try:
        subprocess.run(
            [sys.executable, "-c", text], stderr=follower, env={**environ, **variables}, timeout=30, check=True
        )
        return os.read(leader, 65_536)
    finally:
        os.close(follower)
        os.close(leader)


def test_the_console_format_has_colors_only_on_a_terminal_without_no_color():
    program = 'log.warning("careful", url="amqp://u:hunter@h")'
    coloured = on_a_terminal(program)
    assert b"\x1b[" in coloured
    plain = on_a_terminal(program, NO_COLOR="1")
    assert b"\x1b[" not in plain
    assert b"careful" in plain
    assert b"hunter" not in coloured + plain
    piped = stderr_of(program, log_format="console")
    assert "\x1b[" not in piped
    assert "careful" in piped
    assert "hunter" not in piped
    assert not piped.startswith("{")


def test_json_logs_escape_what_a_terminal_would_act_on():
    (line,) = stderr_of('log.info("found", value="a\\u202eb\\x9b31m")').splitlines()
    assert not {"\u202e", "\x9b"} & set(line)
    assert json.loads(line)["value"] == "a\u202eb\x9b31m"
