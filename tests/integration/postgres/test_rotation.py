"""Rotation of passwords in mounted files under a running worker, in either order, as Kubernetes replaces files."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from servers import PostgresServer, RabbitServer
from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import SettingsError, load_settings
from consumer.amqp.connection import BrokerConnection
from consumer.contract.names import PARKED_QUEUE, RETRY_QUEUE
from tests.support import run_messages as runs
from tests.support.command_line import CLOSEOUT, closeout
from tests.support.faults.running_worker import RunningWorker
from tests.support.traffic import emptied, eventually, publish, published_runs
from tests.support.waiting import until

OLD, NEW = "of-old-3f9c", "of-new-71ab"


class MountedSecret:
    """A file as kubelet mounts it: a link through ..data, which is replaced atomically."""

    def __init__(self, folder: Path, content: str) -> None:
        folder.mkdir()
        self._folder, self._versions = folder, 0
        self.path = folder / "url"
        self.write(content)
        self.path.symlink_to("..data/url")

    def write(self, content: str) -> None:
        self._versions += 1
        version = self._folder / f"..{self._versions}"
        version.mkdir()
        (version / "url").write_text(f"{content}\n")
        (self._folder / "..data_tmp").symlink_to(version.name)
        (self._folder / "..data_tmp").replace(self._folder / "..data")


class Rotation:
    """A role and a user with passwords, the two files that a worker reads, and all output of the worker."""

    def __init__(self, postgres: PostgresServer, rabbit: RabbitServer, database: str, vhost: str, folder: Path) -> None:
        self._postgres, self._rabbit, self._database, self._vhost = postgres, rabbit, database, vhost
        self.role, self.user = f"rotating_{database}", f"rotating-{vhost}"
        self._log = folder / "worker.log"
        self.database = MountedSecret(folder / "database", self._database_url(OLD))
        self.broker = MountedSecret(folder / "broker", self._amqp_url(OLD))
        self.environ = {
            "DATABASE_URL_FILE": str(self.database.path),
            "AMQP_URL_FILE": str(self.broker.path),
            "HTTP_HOST": "127.0.0.1",
            "HTTP_PORT": "0",
            "TRANSACTION_COORDINATOR_ENABLED": "true",
        }
        self.output: list[str] = []

    def _database_url(self, password: str) -> str:
        return self._postgres.url(self._database, user=self.role, password=password)

    def _amqp_url(self, password: str) -> str:
        return self._rabbit.url(self._vhost, user=self.user, password=password)

    def set_up(self) -> None:
        self._postgres.psql(
            f"CREATE ROLE {self.role} LOGIN PASSWORD '{OLD}'; GRANT USAGE ON SCHEMA governance TO {self.role}; "
            f"GRANT ALL ON ALL TABLES IN SCHEMA governance TO {self.role}",
            self._database,
        )
        self._postgres.admit(f"host all {self.role} 127.0.0.1/32 scram-sha-256")
        self._rabbit.add_user(self.user, OLD, "^$", ".*", ".*", self._vhost)

    def change_on_the_servers(self) -> None:
        """Change both passwords, and close the connections opened with the old ones."""
        self._postgres.psql(f"ALTER ROLE {self.role} PASSWORD '{NEW}'")
        self._postgres.psql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{self.role}'")
        self._rabbit.eval(
            f'rabbit_auth_backend_internal:change_password(<<"{self.user}">>, <<"{NEW}">>, <<"tests">>), '
            '[rabbit_networking:close_connection(P, "rotated") || '
            f'[{{pid, P}}, {{user, <<"{self.user}">>}}] <- rabbit_networking:connection_info_all([pid, user])]'
        )

    def change_the_database_s_file(self, role: str = "") -> None:
        self.database.write(self._database_url(NEW).replace(self.role, role or self.role))

    def change_the_broker_s_file(self, user: str = "") -> None:
        self.broker.write(self._amqp_url(NEW).replace(self.user, user or self.user))

    def add_seconds(self) -> tuple[str, str]:
        """Add a second role and user with the privileges of the first; return their names."""
        role, user = f"second_{self.role}", f"second-{self.user}"
        self._postgres.psql(f"CREATE ROLE {role} LOGIN PASSWORD '{NEW}' IN ROLE {self.role}")
        self._postgres.admit(f"host all {self.role},{role} 127.0.0.1/32 scram-sha-256")
        self._rabbit.add_user(user, NEW, "^$", ".*", ".*", self._vhost)
        return role, user

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[RunningWorker]:
        with self._log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                CLOSEOUT, "worker", env=os.environ | self.environ, stderr=errors
            )
        running = RunningWorker(0, process, self._log)
        try:
            await running.find_port()
            yield running
            assert running.alive, "the worker exited unexpectedly"
            self.output += await asyncio.to_thread(_seen_from_outside, process.pid)
            assert await running.stop() == 0
        finally:
            if running.alive:
                await running.kill()
            self.output += running.lines()

    async def waits(self, running: RunningWorker, words: str) -> str:
        """Wait until /readyz gives a reason with *words* in it; return it."""

        async def named() -> str:
            found = (await running.get("/readyz"))[1]
            self.output.append(found)
            return found if words in found else ""

        return await until(named, what=f"a reason with {words!r}")

    async def consumes(self, running: RunningWorker) -> None:
        await self.waits(running, '"ready":true')


def _seen_from_outside(pid: int) -> list[str]:
    """Return a process's arguments and environment, which other users may read."""
    return [Path(f"/proc/{pid}/{file}").read_text() for file in ("cmdline", "environ")]


@pytest.fixture
def rotation(postgres, rabbit, database_url, amqp_url, tmp_path) -> Rotation:
    made = Rotation(postgres, rabbit, database_url.rpartition("/")[2], amqp_url.rpartition("/")[2], tmp_path)
    made.set_up()
    return made


async def test_passwords_changed_on_the_servers_first_cause_an_outage_until_the_files_follow(rotation, engine, broker):
    async with rotation.worker() as running:
        await rotation.consumes(running)
        await asyncio.to_thread(rotation.change_on_the_servers)
        await publish(broker, runs.body())
        output = await rotation.waits(running, "password authentication failed")
        assert f'password authentication failed for user \\"{rotation.role}\\"' in output

        result = await closeout("doctor", **rotation.environ)
        rotation.output += [
            result.stdout,
            result.stderr,
            (await running.get("/"))[1],
            (await running.get("/metrics"))[1],
        ]
        assert result.stdout.count("a worker reads DATABASE_URL_FILE at each attempt") == 1
        assert result.stdout.count("a worker reads AMQP_URL_FILE at each attempt") == 1

        rotation.change_the_database_s_file()
        output = await rotation.waits(running, "ACCESS_REFUSED")
        assert f"(user {rotation.user})" in output
        rotation.change_the_broker_s_file()
        await rotation.consumes(running)
        await eventually(engine, published_runs(), 1)
        assert (await running.get("/"))[0] == 200
    await nothing_else_happened(rotation, broker)


async def test_credentials_of_a_second_role_and_user_rotate_without_an_outage(rotation, engine, broker):
    sessions = text(
        f"SELECT array_agg(pid::text ORDER BY pid) FROM pg_stat_activity "
        f"WHERE usename = '{rotation.role}' AND application_name = 'closeout'"
    )
    async with rotation.worker() as running:
        await rotation.consumes(running)
        before = await value(engine, sessions)
        assert before
        rotation.change_the_database_s_file()
        rotation.change_the_broker_s_file()
        await rotation.consumes(running)
        assert set(before) <= set(await value(engine, sessions))
        # This run is closed out whether it gets an open session or needs a new one that is refused at first.
        await publish(broker, runs.body())
        await asyncio.to_thread(rotation.change_on_the_servers)
        await publish(broker, runs.body())
        await eventually(engine, published_runs(), 2)
        await rotation.consumes(running)
        assert not set(before) & set(await value(engine, sessions))

        logged = len(running.lines())
        role, user = await asyncio.to_thread(rotation.add_seconds)
        rotation.change_the_database_s_file(role)
        rotation.change_the_broker_s_file(user)
        await asyncio.to_thread(rotation.change_on_the_servers)  # which closes the connections of the first ones
        await publish(broker, runs.body())
        await eventually(engine, published_runs(), 3)
        assert await value(engine, sessions) == []
        refused = ("password authentication failed", "ACCESS_REFUSED")
        assert not any(words in line for line in running.lines()[logged:] for words in refused)
    await nothing_else_happened(rotation, broker)


async def value(engine: AsyncEngine, statement: TextClause) -> list[str]:
    async with engine.connect() as conn:
        return list((await conn.execute(statement)).scalar_one() or [])


async def nothing_else_happened(rotation: Rotation, broker: BrokerConnection) -> None:
    """Nothing was parked or retried, and no password is in a log, a response, an argument or the environment."""
    for queue in (PARKED_QUEUE, RETRY_QUEUE):
        assert await emptied(broker, queue) == []
    everything = "\n".join(rotation.output)
    assert all(seen in everything for seen in ("consuming", '"ready":true', "DATABASE_URL_FILE", "worker"))
    assert OLD not in everything
    assert NEW not in everything


def test_an_invalid_url_file_is_reported_and_read_again(tmp_path):
    secret = MountedSecret(tmp_path / "secret", f"postgresql://u:{OLD}@h/d")
    settings = load_settings({"DATABASE_URL_FILE": str(secret.path)}, need_amqp=False)
    for content, words in (
        ("", f"DATABASE_URL_FILE: {secret.path} is empty; expected a file that contains the URL"),
        (f"mysql://u:{NEW}@h/d", "DATABASE_URL: found a secret value; expected postgresql://"),
        (f"postgresql://u:{NEW}@h/d?sslrootcert=/no/ca.pem", "DATABASE_URL: sslrootcert=/no/ca.pem cannot be read"),
    ):
        secret.write(content)
        with pytest.raises(SettingsError) as caught:
            settings.database_url_now()
        assert str(caught.value).startswith(words)
        assert NEW not in str(caught.value)
    secret.write(f"postgresql+asyncpg://u:{NEW}@h/d")
    assert settings.database_url_now() == f"postgresql://u:{NEW}@h/d"
    assert settings.database_url.get_secret_value() == f"postgresql://u:{OLD}@h/d"
