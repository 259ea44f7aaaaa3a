"""``closeout doctor`` reports connections that can be intercepted or impersonated."""

import pytest

from config.settings import examine_settings
from consumer.diagnosis.configuration import examine_configuration


def looked_at(database: str = "postgresql://h/d", amqp: str = "amqps://h") -> list[tuple[str, str]]:
    settings, faults = examine_settings({"DATABASE_URL": database, "AMQP_URL": amqp})
    return [(str(c.state), c.found) for c in examine_configuration(settings, faults) if c.name == "encryption"]


@pytest.mark.parametrize(
    ("url", "state", "words"),
    [
        (
            "postgresql://u@db/d",
            "warning",
            "sslmode=prefer: encrypted if the server supports it; certificate not verified",
        ),
        ("postgresql://u@db/d?sslmode=disable", "warning", "sslmode=disable: not encrypted"),
        ("postgresql://u@db/d?sslmode=require", "warning", "server certificate not verified"),
        ("postgresql://u@db/d?sslmode=verify-full&sslrootcert=system", "ok", "certificate and host name verified"),
        ("postgresql://u@127.0.0.1:5432/d", "ok", "sslmode=prefer"),
        ("postgresql://u@[::1]:5432/d", "ok", "sslmode=prefer"),
        ("postgresql://u@localhost:1,db:2/d", "warning", "sslmode=prefer"),
        ("postgresql:///d?host=/run/postgresql", "ok", "sslmode=prefer"),
        ("postgresql://u@%2Frun%2Fpostgresql/d", "ok", "sslmode=prefer"),
        ("postgresql://u@localhost.example/d", "warning", "sslmode=prefer"),
    ],
)
def test_postgresql_encryption_check(url, state, words):
    found = looked_at(database=url)[0]
    assert found[0] == state
    assert words in found[1]


@pytest.mark.parametrize(
    ("url", "state"), [("amqps://u@mq", "ok"), ("amqp://u@mq", "warning"), ("amqp://u@localhost/v", "ok")]
)
def test_amqp_encryption_check(url, state):
    assert looked_at(amqp=url)[1][0] == state


def test_an_invalid_url_is_not_checked_for_encryption():
    assert looked_at(database="mysql://h") == [
        ("ok", "AMQP_URL, amqps://: encrypted; certificate and host name verified")
    ]
