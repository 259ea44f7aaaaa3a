"""TLS to real servers with a private authority: trusted and refused certificates, and the messages."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pytest
from servers import PostgresServer, RabbitServer
from servers.rabbitmq_tls import TlsListener

from config.settings import load_settings
from consumer.amqp.connection import BrokerConnection
from consumer.amqp.topology import declare
from consumer.diagnosis.broker import examine_broker
from consumer.diagnosis.check import State
from consumer.diagnosis.database import examine_database
from consumer.errors import UnavailableError
from consumer.postgres.engine import create_engine
from consumer.postgres.readiness import probe
from domains.migrations.upgrade import migrate
from tests.support import run_messages as runs
from tests.support.certificates import EXPIRED_ON, HERE, Authority
from tests.support.command_line import closeout
from tests.support.faults.running_worker import RunningWorker
from tests.support.traffic import eventually, publish, published_runs, worker
from tests.support.waiting import until

ROLE = "closeout_worker"


@dataclass
class Office:
    """A trusted authority, an untrusted one, and the certificates that each signed."""

    ours: Authority
    strangers: Authority

    def __post_init__(self) -> None:
        self.good = self.ours.certificate(HERE, "localhost")
        self.expired = self.ours.certificate(HERE, "localhost", expired=True)
        self.elsewhere = self.ours.certificate("db.example", "mq.example")
        self.strange = self.strangers.certificate(HERE, trusts=self.ours)


def _open_connections() -> set[str]:
    """Return this process's sockets, without those of the Unix domain, which reserve ports and wake event loops."""
    unix = {f"socket:[{line.split()[6]}]" for line in Path("/proc/self/net/unix").read_text().splitlines()}
    names = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            names.add(str(descriptor.readlink()))
    return {name for name in names if name.startswith("socket:")} - unix


@pytest.fixture(autouse=True)
async def _tls_connections_have_ended() -> AsyncIterator[None]:
    """Wait until the test's connections are closed.

    asyncio closes the socket of a TLS connection when the server has answered the shutdown. If the event loop ends
    before that, a later test fails with a warning about an unclosed transport.
    """
    before = _open_connections()
    yield
    await until(lambda: _open_connections() <= before, what="the end of all connections")


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Office:
    folder = tmp_path_factory.mktemp("office")
    return Office(Authority(folder / "ours", "Our Own CA"), Authority(folder / "strangers", "Strangers' CA"))


@pytest.fixture(scope="module")
def tls_postgres(folder: Path) -> Iterator[PostgresServer]:
    with PostgresServer(folder / "pg-tls", tls=True) as server:
        asyncio.run(_migrate(server.create_database("closeout")))
        grant = f"CREATE ROLE {ROLE} LOGIN; GRANT USAGE ON SCHEMA governance TO {ROLE}; "
        server.psql(f"{grant} GRANT ALL ON ALL TABLES IN SCHEMA governance TO {ROLE}", "closeout")
        yield server


async def _migrate(url: str) -> None:
    engine = create_engine(url, pool_size=1)
    await migrate(engine)
    await engine.dispose()


@pytest.fixture
def database(tls_postgres: PostgresServer, office: Office) -> PostgresServer:
    """A PostgreSQL with a valid certificate that requires a client certificate of the worker's role."""
    tls_postgres.use_certificate(office.good)
    tls_postgres.admit(f"hostssl all {ROLE} 127.0.0.1/32 cert", f"host all {ROLE} 127.0.0.1/32 reject")
    tls_postgres.psql("TRUNCATE governance.run_completions, governance.incidents CASCADE", "closeout")
    return tls_postgres


def database_url(server: PostgresServer, user: str = "postgres", **parameters: object) -> str:
    return f"postgresql://{user}@{HERE}:{server.port}/closeout?{_query(parameters)}"


def amqp_url(server: RabbitServer, port: int, vhost: str = "", scheme: str = "amqps", **parameters: object) -> str:
    return f"{scheme}://closeout:{server.password}@{HERE}:{port}/{vhost}?{_query(parameters)}"


def _query(parameters: dict[str, object]) -> str:
    return "&".join(f"{name}={quote(str(value), safe='/')}" for name, value in parameters.items())


async def error_of_database(url: str) -> str:
    """Return why a worker would not use the database at *url*, or an empty string."""
    settings = load_settings({"DATABASE_URL": url}, need_amqp=False)
    engine = create_engine(settings.database_url_now, pool_size=1)
    try:
        await probe(engine)
    except UnavailableError as error:
        return str(error)
    finally:
        await engine.dispose()
    return ""


async def error_of_broker(url: str) -> str:
    settings = load_settings({"AMQP_URL": url}, need_database=False)
    connection = BrokerConnection(settings.amqp_url_now, name="tests")
    try:
        await connection.channel(confirms=False)
    except UnavailableError as error:
        return str(error)
    finally:
        await connection.close()
    return ""


def closed(server: str) -> str:
    """Return the message of a worker that received a reset in place of the server's alert."""
    return f"is not available: {server} closed the connection in the TLS handshake, or before login"


async def doctor_of_database(url: str) -> str:
    """Return why the doctor cannot reach the database at *url*, or an empty string."""
    engine = create_engine(load_settings({"DATABASE_URL": url}, need_amqp=False).database_url_now, pool_size=1)
    checks = await examine_database(engine, connections_needed=1, clock=lambda: datetime.now(UTC))
    await engine.dispose()
    return checks[0].found if checks[0].state is State.PROBLEM else ""


async def doctor_of_broker(url: str) -> str:
    settings = load_settings({"AMQP_URL": url}, need_database=False)
    connection = BrokerConnection(settings.amqp_url_now, name="tests")
    checks = await examine_broker(connection)
    await connection.close()
    return checks[0].found if checks[0].state is State.PROBLEM else ""


async def test_a_postgresql_certificate_needs_the_right_host_dates_and_authority(database, office):
    checked = database_url(database, sslmode="verify-full", sslrootcert=office.ours.file)
    host_unchecked = checked.replace("verify-full", "verify-ca")
    at = f"PostgreSQL is not available: the certificate of {HERE}:{database.port}"

    assert await error_of_database(checked) == ""

    database.use_certificate(office.elsewhere)
    assert await error_of_database(checked) == f"{at} is not valid for {HERE}"
    assert await error_of_database(host_unchecked) == ""

    database.use_certificate(office.expired)
    assert await error_of_database(checked) == f"{at} has expired"
    assert await error_of_database(host_unchecked) == f"{at} has expired"

    database.use_certificate(office.strange)
    by_strangers = f"{at} is not signed by"
    assert await error_of_database(checked) == f"{by_strangers} sslrootcert={office.ours.file}"
    assert await error_of_database(host_unchecked) == f"{by_strangers} sslrootcert={office.ours.file}"
    anybody = database_url(database, sslmode="verify-full", sslrootcert="system")
    assert await error_of_database(anybody) == f"{by_strangers} any authority that this machine trusts"


async def test_postgresql_certificates_of_the_system_authorities_are_accepted(database, office, monkeypatch):
    monkeypatch.setenv(ssl.get_default_verify_paths().openssl_cafile_env, str(office.ours.file))
    url = database_url(database, sslmode="verify-full", sslrootcert="system")
    assert await error_of_database(url) == ""
    database.use_certificate(office.elsewhere)
    assert f"is not valid for {HERE}" in await error_of_database(url)


async def test_a_postgresql_without_tls_is_refused_where_tls_is_required(database, postgres, office):
    here = f"PostgreSQL is not available: {HERE}:{postgres.port}"
    url = database_url(postgres, sslmode="verify-full", sslrootcert=office.ours.file)
    assert await error_of_database(url) == f"{here} does not use TLS, which sslmode=verify-full requires"
    # In the other direction, with PostgreSQL's message.
    assert "no encryption" in await error_of_database(database_url(database, ROLE, sslmode="disable"))


async def test_postgresql_accepts_only_the_client_certificate_of_the_role(database, office):
    def with_identity(cert: Path, key: Path) -> str:
        checked = {"sslmode": "verify-full", "sslrootcert": office.ours.file}
        return database_url(database, ROLE, **checked, sslcert=cert, sslkey=key)

    own = office.ours.identity("own", user=ROLE)
    theirs = office.strangers.identity("stranger", user=ROLE)
    late = office.ours.identity("late", user=ROLE, expired=True)
    stranger = office.ours.identity("stranger", user="stranger")
    at = f"{HERE}:{database.port}"

    assert await error_of_database(with_identity(*own)) == ""
    assert await doctor_of_database(with_identity(*own)) == ""
    for url, cause in (
        (with_identity(*theirs), f"does not trust the authority that signed our certificate, sslcert={theirs[0]}"),
        (with_identity(*late), f"reports that our certificate, sslcert={late[0]}, has expired"),
    ):
        assert await doctor_of_database(url) == f"not reachable: {at} {cause}"
        assert await error_of_database(url) in {
            f"PostgreSQL is not available: {at} {cause}",
            f"PostgreSQL {closed(at)}",
        }
    assert "certificate authentication failed" in await error_of_database(with_identity(*stranger))
    none = database_url(database, ROLE, sslmode="verify-full", sslrootcert=office.ours.file)
    assert "requires a valid client certificate" in await error_of_database(none)


async def test_a_rabbitmq_certificate_needs_the_right_host_dates_and_authority(any_rabbit, office):
    listener = any_rabbit.open_tls(office.good)
    url = amqp_url(any_rabbit, listener.port, cafile=office.ours.file)
    at = f"RabbitMQ is not available: the certificate of {HERE}:{listener.port}"

    assert await error_of_broker(url) == ""
    for certificate, message in (
        (office.elsewhere, f"is not valid for {HERE}"),
        (office.expired, "has expired"),
        (office.strange, f"is not signed by cafile={office.ours.file}"),
    ):
        listener.use_certificate(certificate)
        assert await error_of_broker(url) == f"{at} {message}"
    machine_s = amqp_url(any_rabbit, listener.port)
    output = f"{at} is not signed by any authority that this machine trusts"
    assert await error_of_broker(machine_s) == output

    plain, here = amqp_url(any_rabbit, listener.port, scheme="amqp"), f"RabbitMQ is not available: {HERE}"
    assert await error_of_broker(plain) == f"{here}:{listener.port} closed the connection before login"
    wrong_port = amqp_url(any_rabbit, any_rabbit.port, cafile=office.ours.file)
    assert await error_of_broker(wrong_port) == f"{here}:{any_rabbit.port} does not use TLS"


async def test_rabbitmq_accepts_only_client_certificates_of_its_authority(any_rabbit, office):
    port = any_rabbit.open_tls(office.good, clients_must_have_one=True).port

    def with_identity(cert: Path, key: Path) -> str:
        return amqp_url(any_rabbit, port, cafile=office.ours.file, certfile=cert, keyfile=key)

    own = office.ours.identity("broker-own", user="worker")
    theirs = office.strangers.identity("broker-stranger", user="worker")
    late = office.ours.identity("broker-late", user="worker", expired=True)
    at = f"{HERE}:{port}"

    assert await error_of_broker(with_identity(*own)) == ""
    assert await doctor_of_broker(with_identity(*own)) == ""
    for url, cause in (
        (with_identity(*theirs), f"does not trust the authority that signed our certificate, certfile={theirs[0]}"),
        (with_identity(*late), f"reports that our certificate, certfile={late[0]}, has expired"),
        (amqp_url(any_rabbit, port, cafile=office.ours.file), "requires a client certificate"),
    ):
        assert await doctor_of_broker(url) == f"not reachable: {at} {cause}"
        assert await error_of_broker(url) in {f"RabbitMQ is not available: {at} {cause}", f"RabbitMQ {closed(at)}"}


@dataclass
class Place:
    """Both servers with TLS, a vhost with the topology, and the worker's URLs with its own certificate."""

    database: PostgresServer
    rabbit: RabbitServer
    listener: TlsListener
    plain: BrokerConnection
    database_url: str
    amqp_url: str

    async def close_connections(self) -> None:
        """End the worker's sessions and connections, which outlive their certificates."""
        await asyncio.to_thread(
            self.database.psql, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'"
        )
        of_listener = (
            f"[P || [{{pid, P}}, {{port, {self.listener.port}}}] <- rabbit_networking:connection_info_all([pid, port])]"
        )
        close = f'[rabbit_networking:close_connection(P, "renewed") || P <- {of_listener}]'
        await asyncio.to_thread(self.rabbit.eval, close)


@pytest.fixture
async def place(
    database: PostgresServer, rabbit: RabbitServer, bare_amqp_url: str, office: Office
) -> AsyncIterator[Place]:
    plain = BrokerConnection(bare_amqp_url, name="tests")
    await declare(plain)
    listener = await asyncio.to_thread(rabbit.open_tls, office.good, clients_must_have_one=True)
    cert, key = office.ours.identity("worker", user=ROLE)
    yield Place(
        database,
        rabbit,
        listener,
        plain,
        database_url(database, ROLE, sslmode="verify-full", sslrootcert=office.ours.file, sslcert=cert, sslkey=key),
        amqp_url(
            rabbit,
            listener.port,
            bare_amqp_url.rpartition("/")[2],
            cafile=office.ours.file,
            certfile=cert,
            keyfile=key,
        ),
    )
    await plain.close()


async def reason(running: RunningWorker, message: str) -> str:
    """Wait until /readyz gives a reason with *message* in it, and return it."""

    async def named() -> str:
        found = str((await running.state()).get("reason") or "")
        return found if message in found else ""

    return await until(named, what=f"a reason with {message!r}")


async def test_a_worker_uses_tls_with_its_client_certificate_for_all_connections(place):
    engine = create_engine(place.database.url("closeout"), pool_size=1)
    async with worker(place.database_url, place.amqp_url) as service:
        await publish(place.plain, *[runs.body() for _ in range(20)])
        await eventually(engine, published_runs(), 20)
        assert (await RunningWorker(service.http.port).get("/"))[0] == 200  # the console has its own connections
        sessions = (
            "SELECT DISTINCT application_name, ssl, client_dn IS NOT NULL FROM pg_stat_ssl "
            f"JOIN pg_stat_activity USING (pid) WHERE usename = '{ROLE}' ORDER BY 1"
        )
        connections = (
            f"length([P || [{{port, {place.listener.port}}}, {{ssl, true}}, {{pid, P}}] <- "
            "rabbit_networking:connection_info_all([port, ssl, pid])])"
        )
        # Connections to consume, to publish, and the console's, for which a page does not wait.
        expected = ["closeout\tt\tt", "closeout-console\tt\tt"], 3

        async def all_with_tls() -> bool:
            output = await asyncio.to_thread(place.database.psql, sessions)
            return (output.splitlines(), int(await asyncio.to_thread(place.rabbit.eval, connections))) == expected

        await until(all_with_tls)
    await engine.dispose()


async def test_a_worker_reports_an_expired_certificate_and_continues_once_it_is_renewed(place, office):
    engine = create_engine(place.database.url("closeout"), pool_size=1)
    async with worker(place.database_url, place.amqp_url) as service:
        running = RunningWorker(service.http.port)
        await until(running.ready)
        await asyncio.to_thread(place.database.use_certificate, office.expired)
        await asyncio.to_thread(place.listener.use_certificate, office.expired)
        await place.close_connections()
        of_database, of_broker = f"the certificate of {HERE}:{place.database.port}", f"{HERE}:{place.listener.port}"
        assert f"{of_database} has expired" in await reason(running, "expired")
        await publish(place.plain, runs.body())

        output = await closeout("doctor", DATABASE_URL=place.database_url, AMQP_URL=place.amqp_url)
        assert output.returncode == 1
        hosts, issuer = f"{HERE}, for {HERE}, localhost", "Our Own CA"
        certificate = f"has expired ({hosts}, signed by {issuer}, valid until {EXPIRED_ON})"
        assert output.stdout.count(certificate) == 2
        assert output.stdout.count("to do: renew the server's certificate and reload it") == 2

        await asyncio.to_thread(place.database.use_certificate, office.good)
        assert f"{of_broker} has expired" in await reason(running, of_broker)
        await asyncio.to_thread(place.listener.use_certificate, office.good)
        await until(running.ready)
        await eventually(engine, published_runs(), 1)
    await engine.dispose()


async def test_a_client_certificate_renewed_on_disk_is_used_without_a_restart(place, office):
    office.ours.identity("worker", user=ROLE, expired=True)
    async with worker(place.database_url, place.amqp_url) as service:
        running = RunningWorker(service.http.port)
        expired = f"{HERE}:{place.database.port} reports that our certificate, sslcert="
        found = await reason(running, f"{HERE}:{place.database.port}")
        assert expired in found or closed(f"{HERE}:{place.database.port}") in found
        _, key = office.ours.identity("worker", user=ROLE)
        await until(running.ready)
        key.unlink()
        await place.close_connections()
        output = await reason(running, "cannot be read")
        assert (
            output
            == f"PostgreSQL is not available: DATABASE_URL: sslkey={key} cannot be read: No such file or directory"
        )
        office.ours.identity("worker", user=ROLE)
        await until(running.ready)
