"""The environment is read once and validated together, and its secrets stay secret."""

import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from config.settings import Settings, SettingsError, describe, load_settings
from config.urls import in_connect_order
from domains.run import TenantId

DATABASE = "postgresql://worker:hunter2@db.example/closeout?sslmode=require"
AMQP = "amqp://worker:hunter3@mq.example:5672/prod"
ENVIRON = {"DATABASE_URL": DATABASE, "AMQP_URL": AMQP}
DATABASE_RIGHT = "expected postgresql://user:password@host/database, with libpq's parameters such as ?sslmode=require"
AMQP_RIGHT = "expected amqp://user:password@host:5672/vhost, or amqps:// for TLS"
ENCODED = "; encode / ? # @ in a password as %2F %3F %23 %40"

# The contract's section 6, where it gives a number or a word.
DEFAULTS = {
    "transaction_coordinator_enabled": False,
    "transaction_coordinator_tenants": frozenset(),
    "legacy_fallback_enabled": False,
    "delivery_max_attempts": 5,
    "message_max_bytes": 1_048_576,
    "trusted_publishers": frozenset(),
    "require_event_subscribers": False,
    "intake_queues": 1,
    "http_host": "0.0.0.0",
    "http_port": 9464,
    "shutdown_grace_seconds": 25,
    "log_level": "INFO",
    "log_format": "json",
}
MEASURED = {"prefetch_count", "batch_max_runs", "max_concurrent_transactions"}


def load(**changes: str) -> Settings:
    return load_settings({**ENVIRON, **changes})


def faults(environ: dict[str, str], **needs: bool) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ, **needs)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(("name", "value"), DEFAULTS.items())
def test_each_default_is_that_of_the_contract(name: str, value: object):
    assert getattr(load(), name) == value


def test_the_settings_are_those_of_the_contract():
    names = {variable for variable, _, _ in describe()}
    assert names == {name.upper() for name in (*DEFAULTS, *MEASURED, "database_url", "amqp_url")}
    assert all(getattr(load(), name) >= 1 for name in MEASURED)


def test_described_defaults_have_the_notation_of_the_environment():
    found = {variable: default for variable, default, _ in describe()}
    assert found["DATABASE_URL"] == "required"
    assert found["TRUSTED_PUBLISHERS"] == "empty"
    assert found["LEGACY_FALLBACK_ENABLED"] == "false"
    assert found["SHUTDOWN_GRACE_SECONDS"] == "25"
    assert found["LOG_FORMAT"] == "json"
    assert all(meaning for _, _, meaning in describe())


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("TRANSACTION_COORDINATOR_ENABLED", "true", True),
        ("TRANSACTION_COORDINATOR_ENABLED", "1", True),
        ("TRANSACTION_COORDINATOR_ENABLED", "FALSE", False),
        ("TRANSACTION_COORDINATOR_TENANTS", "acme, globex,,", frozenset({"acme", "globex"})),
        ("TRUSTED_PUBLISHERS", " , ", frozenset()),
        ("PREFETCH_COUNT", "1", 1),
        ("PREFETCH_COUNT", "65535", 65_535),
        ("INTAKE_QUEUES", "32", 32),
        ("HTTP_PORT", "0", 0),
        ("HTTP_PORT", "65535", 65_535),
        ("SHUTDOWN_GRACE_SECONDS", "0.5", 0.5),
        ("MESSAGE_MAX_BYTES", "1024", 1_024),
        ("LOG_LEVEL", "DEBUG", "DEBUG"),
        ("LOG_FORMAT", "console", "console"),
    ],
)
def test_a_variable_is_read(variable: str, text: str, value: object):
    assert getattr(load(**{variable: text}), variable.lower()) == value


@pytest.mark.parametrize("variable", [name.upper() for name in (*DEFAULTS, *sorted(MEASURED))])
def test_an_empty_variable_counts_as_not_set(variable: str):
    assert load(**{variable: ""}) == load()


@pytest.mark.parametrize("url", ["postgresql+asyncpg://u:p@h/d", "postgres://u:p@h/d", "postgresql://u:p@h/d"])
def test_a_database_url_is_accepted_with_each_scheme(url: str):
    assert load(DATABASE_URL=url).database_url.get_secret_value() == "postgresql://u:p@h/d"


HOSTS = ("one:1", "two:2", "[::1]:3")


def test_load_balance_hosts_gives_each_session_a_random_order_of_the_hosts():
    url = f"postgresql://u:p%2C@{','.join(HOSTS)}/db?load_balance_hosts=random&sslmode=disable"
    orders = {in_connect_order(url) for _ in range(200)}
    assert orders == {
        f"postgresql://u:p%2C@{','.join(hosts)}/db?sslmode=disable" for hosts in itertools.permutations(HOSTS)
    }


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("postgresql://u@one,two/db?load_balance_hosts=disable", "postgresql://u@one,two/db"),
        ("postgresql://u@one,two/db?sslmode=disable", "postgresql://u@one,two/db?sslmode=disable"),
        ("postgresql://u@one,two/db", "postgresql://u@one,two/db"),
    ],
)
def test_without_load_balance_hosts_the_order_is_kept(url, kept):
    assert in_connect_order(url) == kept


@pytest.mark.parametrize("query", ["load_balance_hosts=yes", "host=one,two&load_balance_hosts=random"])
def test_a_load_balance_hosts_that_cannot_be_followed_is_refused(query):
    with pytest.raises(SettingsError, match=r"DATABASE_URL: load_balance_hosts=\w+ (expected|needs)"):
        load(DATABASE_URL=f"postgresql://u@/db?{query}")


@pytest.mark.parametrize(
    "rest",
    [
        "u:p@h1:5432,h2:5433/d?target_session_attrs=read-write",
        "u:p@[::1]:5432/d?sslmode=verify-full&sslrootcert=system",
        "/d?host=/run/postgresql",
        "%2Frun%2Fpostgresql/d",
    ],
)
def test_several_hosts_sockets_and_parameters_of_libpq_are_kept(rest: str):
    url = load(DATABASE_URL=f"postgresql+asyncpg://{rest}").database_url
    assert url.get_secret_value() == f"postgresql://{rest}"


def test_white_space_around_a_url_is_removed():
    settings = load(DATABASE_URL=f" {DATABASE}\n", AMQP_URL=f"{AMQP}\r\n")
    assert settings.database_url.get_secret_value() == DATABASE
    assert settings.amqp_url.get_secret_value() == AMQP


@pytest.mark.parametrize("url", ["amqp://u:p@h:5672/v", "amqps://u:p@h"])
def test_an_amqp_url_is_kept(url: str):
    assert load(AMQP_URL=url).amqp_url.get_secret_value() == url


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("TRANSACTION_COORDINATOR_ENABLED", "maybe", "found 'maybe'; expected true or false"),
        ("PREFETCH_COUNT", "0", "found '0'; expected at least 1"),
        ("PREFETCH_COUNT", "65536", "found '65536'; expected at most 65535"),
        ("DELIVERY_MAX_ATTEMPTS", "many", "found 'many'; expected a whole number"),
        ("DELIVERY_MAX_ATTEMPTS", "1.5", "found '1.5'; expected a whole number"),
        ("MESSAGE_MAX_BYTES", "1023", "found '1023'; expected at least 1024"),
        ("HTTP_PORT", "65536", "found '65536'; expected at most 65535"),
        ("HTTP_PORT", "-1", "found '-1'; expected at least 0"),
        ("SHUTDOWN_GRACE_SECONDS", "soon", "found 'soon'; expected a number"),
        ("SHUTDOWN_GRACE_SECONDS", "inf", "found 'inf'; expected at most 3600.0"),
        ("LOG_LEVEL", "info", "found 'info'; expected one of 'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
        (
            "TRANSACTION_COORDINATOR_TENANTS",
            "acme;globex",
            "found 'acme;globex'; expected tenant ids of A-Z a-z 0-9 . _ - : @ + ~ = separated by commas",
        ),
        ("LOG_FORMAT", "xml", "found 'xml'; expected one of 'json' or 'console'"),
        ("DATABASE_URL", "mysql://u:hunter2@h/d", f"found a secret value; {DATABASE_RIGHT}{ENCODED}"),
        ("AMQP_URL", "http://u:hunter3@h", f"found a secret value; {AMQP_RIGHT}{ENCODED}"),
        ("AMQP_URL", "amqp://", f"found a secret value; {AMQP_RIGHT}{ENCODED}"),
        ("AMQP_URL", "amqp://[hunter3", f"found a secret value; {AMQP_RIGHT}{ENCODED}"),
    ],
)
def test_an_invalid_value_is_reported_with_the_values_expected(variable: str, text: str, words: str):
    assert faults({**ENVIRON, variable: text}) == [f"{variable}: {words}"]


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("SHUTDOWN_GRACE_SECONDS", "0"),
        ("SHUTDOWN_GRACE_SECONDS", "-1"),
        ("SHUTDOWN_GRACE_SECONDS", "nan"),
        ("PREFETCH_COUNT", "9" * 5000),
        ("AMQP_URL", "amqp://u:hunter3@h:port"),
        ("AMQP_URL", "amqp://u:hunter3@h:99999"),
        ("DATABASE_URL", "postgresql://u:hunter2@h:port/d"),
        ("DATABASE_URL", "postgresql://u:12#hunter2@h/d"),  # read as port 12 of host u
        ("DATABASE_URL", "postgresql://u:hunter2@h/d\nsecond line"),
        ("DATABASE_URL", "postgresql://u:hunter2@h/d\x00"),
        ("AMQP_URL", "amqp://u:12#hunter3@h"),
        ("AMQP_URL", "amqp://u:\udcff@h"),
        ("TRANSACTION_COORDINATOR_TENANTS", "acme globex"),
        ("TRANSACTION_COORDINATOR_TENANTS", "acme,*"),
        ("TRANSACTION_COORDINATOR_TENANTS", "x" * 129),
    ],
)
def test_an_invalid_value_is_refused_on_one_short_line(variable: str, text: str):
    found = faults({**ENVIRON, variable: text})
    assert len(found) == 1
    assert found[0].startswith(f"{variable}: found ")
    assert len(found[0]) < 250


def test_all_faults_are_reported_together():
    environ = {
        "AMQP_URL": "hunter3",
        "HTTP_PORT": "x",
        "LOG_LEVEL": "loud",
        "LEGACY_FALLBACK_ENABLED": "perhaps",
        "DATABASE_URL_FILE": "/nowhere",
    }
    assert sorted(faults(environ)) == [
        f"AMQP_URL: found a secret value; {AMQP_RIGHT}{ENCODED}",
        (
            "DATABASE_URL_FILE: cannot read /nowhere: No such file or directory; "
            "expected a file that contains only the URL"
        ),
        "HTTP_PORT: found 'x'; expected a whole number",
        "LEGACY_FALLBACK_ENABLED: found 'perhaps'; expected true or false",
        "LOG_LEVEL: found 'loud'; expected one of 'DEBUG', 'INFO', 'WARNING' or 'ERROR'",
    ]


def test_a_missing_required_variable_is_reported():
    assert faults({}) == [f"DATABASE_URL: not set; {DATABASE_RIGHT}", f"AMQP_URL: not set; {AMQP_RIGHT}"]


def test_a_command_that_needs_one_server_requires_one_url():
    assert load_settings({"DATABASE_URL": DATABASE}, need_amqp=False).database_url.get_secret_value() == DATABASE
    assert load_settings({"AMQP_URL": AMQP}, need_database=False).amqp_url.get_secret_value() == AMQP
    assert faults({}, need_amqp=False) == [f"DATABASE_URL: not set; {DATABASE_RIGHT}"]
    assert faults({"DATABASE_URL": DATABASE, "AMQP_URL": "x"}, need_amqp=False) == [
        f"AMQP_URL: found a secret value; {AMQP_RIGHT}{ENCODED}"
    ]


def test_no_text_of_the_settings_contains_a_secret():
    settings = load()
    for text in (
        repr(settings),
        str(settings),
        str(settings.model_dump()),
        settings.model_dump_json(),
        f"{settings!r}",
    ):
        assert "hunter" not in text
        assert "example" not in text


@pytest.mark.parametrize(
    "environ",
    [
        {"DATABASE_URL": "mysql://u:hunter2@h", "AMQP_URL": "hunter3"},
        {"DATABASE_URL": "hunter2"},
        {**ENVIRON, "DATABASE_URL_FILE": "/x", "AMQP_URL_FILE": "/y"},
        {**ENVIRON, "HTTP_PORT": "x"},
        {**ENVIRON, "HTTP_PORT": AMQP, "LOG_LEVEL": DATABASE, "TRANSACTION_COORDINATOR_TENANTS": AMQP},
        {"DATABASE_URL_FILE": DATABASE, "AMQP_URL_FILE": AMQP},
    ],
)
def test_no_error_and_no_cause_of_it_contains_a_secret(environ: dict[str, str]):
    with pytest.raises(SettingsError) as caught:
        load_settings(environ)
    link: BaseException | None = caught.value
    while link is not None:
        assert "hunter" not in str(link) + repr(link)
        link = link.__cause__ or link.__context__


def test_a_mounted_secret_is_read_without_its_final_newline(tmp_path: Path):
    (tmp_path / "db").write_text(f"{DATABASE}\n")
    (tmp_path / "mq").write_text(f"  {AMQP}\r\n")
    files = {"DATABASE_URL_FILE": str(tmp_path / "db"), "AMQP_URL_FILE": str(tmp_path / "mq")}
    settings = load_settings({**files, "DATABASE_URL": ""})
    assert settings.database_url.get_secret_value() == DATABASE
    assert settings.amqp_url.get_secret_value() == AMQP


def test_an_invalid_mounted_secret_is_reported_without_its_content(tmp_path: Path):
    empty, binary, wrong = tmp_path / "empty", tmp_path / "binary", tmp_path / "wrong"
    empty.write_text("\n")
    binary.write_bytes(b"hunter2\xff")
    wrong.write_text("http://u:hunter3@h")
    expected: list[tuple[dict[str, Any], str]] = [
        (
            {"DATABASE_URL_FILE": str(empty)},
            f"DATABASE_URL_FILE: {empty} is empty; expected a file that contains the URL",
        ),
        (
            {"DATABASE_URL_FILE": str(binary)},
            f"DATABASE_URL_FILE: cannot read {binary}: it is not text; expected a file that contains only the URL",
        ),
        (
            {"DATABASE_URL_FILE": str(tmp_path)},
            f"DATABASE_URL_FILE: cannot read {tmp_path}: Is a directory; expected a file that contains only the URL",
        ),
    ]
    for environ, words in expected:
        assert faults({"AMQP_URL": AMQP, **environ}) == [words]
    assert faults({"DATABASE_URL": DATABASE, "AMQP_URL_FILE": str(wrong)}) == [
        f"AMQP_URL: found a secret value; {AMQP_RIGHT}{ENCODED}"
    ]


def test_a_url_in_place_of_a_path_is_reported_without_its_content():
    assert faults({"DATABASE_URL": DATABASE, "AMQP_URL_FILE": AMQP}) == [
        "AMQP_URL_FILE: found a URL; expected the path of a file that contains it"
    ]


def test_an_impossible_path_is_reported():
    (fault,) = faults({"DATABASE_URL": DATABASE, "AMQP_URL_FILE": "a\x00b"})
    assert fault.startswith("AMQP_URL_FILE: cannot read ")


def test_a_secret_set_both_as_variable_and_as_file_is_refused():
    assert faults({**ENVIRON, "AMQP_URL_FILE": "/run/secrets/amqp"}) == [
        "AMQP_URL: AMQP_URL_FILE is also set; set only one of them"
    ]


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("PREFETCH_CUONT", "PREFETCH_COUNT"),
        ("TRANSACTION_COORDINATOR_ENABLE", "TRANSACTION_COORDINATOR_ENABLED"),
        ("DATABASE_URL_FILES", "DATABASE_URL_FILE"),
        ("TRUSTED_PUBLISHER", "TRUSTED_PUBLISHERS"),
        ("TRANSACTION_COORDINATOR", "TRANSACTION_COORDINATOR_ENABLED"),
        ("LEGACY_FALLBACK", "LEGACY_FALLBACK_ENABLED"),
        ("transaction_coordinator_enabled", "TRANSACTION_COORDINATOR_ENABLED"),
    ],
)
def test_a_misspelled_variable_is_a_warning_that_names_the_setting(variable: str, meant: str):
    assert load(**{variable: "hunter4"}).warnings == (f"{variable} is not a setting; did you mean {meant}?",)


@pytest.mark.parametrize(
    "variable", ["PATH", "HOME", "LOG_LEVE", "HTTP_PROXY", "http_proxy", "PGHOST", "WARNINGS", "AMQP_URL_OF_X"]
)
def test_variables_of_other_programs_cause_no_warning(variable: str):
    assert load(**{variable: "x"}).warnings == ()


def test_a_batch_size_that_is_never_reached_is_a_warning():
    assert load(BATCH_MAX_RUNS="500", PREFETCH_COUNT="100").warnings == (
        "BATCH_MAX_RUNS=500 is never reached: PREFETCH_COUNT is 100",
    )


def test_a_prefetch_count_below_the_number_of_queues_is_a_warning():
    assert load(INTAKE_QUEUES="4", PREFETCH_COUNT="4", BATCH_MAX_RUNS="4").warnings == (
        "PREFETCH_COUNT=4 is exceeded: each of the 5 queues of INTAKE_QUEUES=4 needs at least 1",
    )
    assert load(PREFETCH_COUNT="1", BATCH_MAX_RUNS="1").warnings == ()


@pytest.mark.parametrize("variable", ["TRUSTED_PUBLISHERS", "TRANSACTION_COORDINATOR_TENANTS"])
def test_a_list_that_is_set_and_empty_is_a_warning(variable: str):
    assert load(**{variable: " , "}).warnings == (f"{variable} is set but empty: an empty list means all",)


@examples(deadline=None, database=None)
@given(st.text(max_size=130) | st.from_regex(r"[A-Za-z0-9._:@+~=-]{1,129}", fullmatch=True))
def test_the_setting_accepts_exactly_the_tenant_ids_that_messages_may_have(tenant: str):
    def fits(name: str) -> bool:
        try:
            msgspec.convert(name, TenantId)
        except msgspec.ValidationError:
            return False
        return True

    words = [word.strip() for word in tenant.split(",") if word.strip()]
    try:
        named = load(TRANSACTION_COORDINATOR_TENANTS=tenant or ",").transaction_coordinator_tenants
    except SettingsError:
        assert not all(map(fits, words))
    else:
        assert named == set(words)
        assert all(map(fits, named))


def test_settings_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        load().http_port = 1


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch):
    for name, value in {**ENVIRON, "HTTP_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    assert load_settings().http_port == 1234
