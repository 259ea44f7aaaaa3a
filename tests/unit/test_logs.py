"""Logs: one JSON object a line on standard error, no password, no exception of their own."""

import json
import subprocess
import sys

import pytest

SETUP = """
import logging, structlog
from config.logs import configure_logs
configure_logs("INFO", {format!r})
log = structlog.get_logger("test")
class Odd:
    def __str__(self): raise RuntimeError("odd")
"""


def logged(code: str, log_format: str = "json") -> str:
    done = subprocess.run(
        [sys.executable, "-c", SETUP.format(format=log_format) + code], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return done.stderr


def records(code: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in logged(code).splitlines()]


def test_a_record_is_one_json_object_with_time_level_event_and_what_is_bound():
    (record,) = records("structlog.contextvars.bind_contextvars(run_id='r'); log.info('hello', phase='COMMITTED')")
    assert (record["event"], record["level"], record["run_id"], record["phase"]) == ("hello", "info", "r", "COMMITTED")
    assert str(record["timestamp"]).endswith("Z")


def test_loggers_of_libraries_go_through_the_same_door_and_only_from_warning_on():
    found = records(
        "logging.getLogger('aio_pika').info('quiet'); logging.getLogger('aio_pika').warning('loud %s', 1);"
        "logging.getLogger('other').info('heard'); log.debug('not this')"
    )
    assert [record["event"] for record in found] == ["loud 1", "heard"]


def test_passwords_in_urls_are_masked_wherever_they_stand():
    text = logged(
        "log.info('at amqp://user:hunter2@host/v', url='postgresql://u:hunter2@h/d');"
        "logging.getLogger('other').warning('amqp://user:hunter2@host')\n"
        "try: raise ValueError('cannot reach amqps://user:hunter2@host')\n"
        "except ValueError: log.exception('failed')"
    )
    assert "hunter2" not in text
    assert text.count("***@") == 4


@pytest.mark.parametrize(
    "value", ["b'\\xff\\x00'", "'\\ud800'", "'x' * 1_000_000", "Odd()", "ValueError('\\ud800')", "{'a': Odd}", "None"]
)
def test_odd_values_cost_no_record(value):
    (record,) = records(f"log.info('odd', value={value})")
    assert record["event"] == "odd"
    assert len(json.dumps(record)) < 40_000


def test_for_people_the_console_format_has_no_colours_without_a_terminal():
    text = logged("log.info('hello', n=1)", "console")
    assert "hello" in text
    assert "\x1b" not in text
