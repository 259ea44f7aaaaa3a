"""The private servers of all other tests: they start, stop, fail on request, and leave no process or file."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import pika
import psycopg
import pytest
from servers import PostgresServer, PrometheusServer, RabbitServer, ServerError
from servers.binaries.debian_program import KUBECTL, PGBOUNCER, PROMETHEUS, DebianProgram
from servers.binaries.rabbitmq import RELEASES, Version
from servers.ports import Port
from servers.run import wait_for
from servers.server import answers_amqp
from servers.subreaper import descendants

CHECKOUT = Path(__file__).parents[3]
COMMAND = [sys.executable, str(CHECKOUT / "scripts/servers/__main__.py")]
EXIT_SECONDS = 30.0  # usually less than one
START_SECONDS = 90.0  # for both servers; eight on two idle cores


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg")) as server:
        yield server


@pytest.fixture(scope="module", params=["4", "3.10"])
def rabbit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    with RabbitServer(tmp_path_factory.mktemp("mq"), version=request.param) as server:
        yield server


def test_a_restarted_postgres_keeps_its_port_and_data(postgres: PostgresServer) -> None:
    url = postgres.create_database("kept")
    postgres.psql("CREATE TABLE t (i int); INSERT INTO t VALUES (1), (NULL)", "kept")
    postgres.restart()
    assert postgres.psql("SELECT i, 'x' FROM t", "kept") == "1\tx\n\tx"
    assert url == postgres.url("kept")
    postgres.drop_database("kept")


def test_a_killed_postgres_recovers_what_was_committed(postgres: PostgresServer) -> None:
    postgres.psql("CREATE TABLE committed (i int); INSERT INTO committed VALUES (1)")
    postgres.kill()
    assert not postgres.running
    postgres.start()
    assert postgres.psql("SELECT i FROM committed") == "1"


async def test_a_suspended_postgres_keeps_its_connections_but_does_not_respond(postgres: PostgresServer) -> None:
    connection = await asyncpg.connect(postgres.url())
    postgres.suspend()
    try:
        with pytest.raises(TimeoutError):
            await asyncpg.connect(postgres.url(), timeout=0.2)
    finally:
        postgres.resume()
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


def test_a_refused_statement_raises_the_error_of_its_sqlstate(postgres: PostgresServer) -> None:
    with pytest.raises(psycopg.errors.UndefinedTable, match="nowhere"):
        postgres.psql("SELECT * FROM nowhere")
    with pytest.raises(psycopg.OperationalError, match='database "nowhere" does not exist'):
        postgres.psql("SELECT 1", database="nowhere")


def test_a_database_is_a_copy_of_its_template(postgres: PostgresServer) -> None:
    postgres.create_database("origin")
    postgres.psql("CREATE TABLE t (i int)", "origin")
    postgres.create_database("copy", template="origin")
    assert postgres.psql("SELECT count(*) FROM t", "copy") == "0"


def test_postgres_has_the_durability_of_production(postgres: PostgresServer) -> None:
    assert postgres.psql("SHOW fsync") == "on"
    assert postgres.psql("SHOW listen_addresses") == "127.0.0.1"
    assert postgres.psql("SHOW unix_socket_directories") == ""


def test_a_failed_start_reports_the_end_of_the_log(postgres: PostgresServer) -> None:
    postgres.stop()
    postgres.settings["no_such"] = "1"
    with pytest.raises(ServerError, match='unrecognized configuration parameter "no_such"'):
        postgres.start()
    del postgres.settings["no_such"]
    postgres.start()


def test_a_server_does_not_start_on_a_port_that_is_taken(postgres: PostgresServer, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=f"port {postgres.port} is taken"):
        PostgresServer(tmp_path, port=postgres.port).start()


def test_a_server_outlives_the_thread_that_started_it(postgres: PostgresServer) -> None:
    postgres.stop()
    assert not postgres.running
    thread = threading.Thread(target=postgres.start)
    thread.start()
    thread.join()
    assert postgres.psql("SELECT 1") == "1"


def test_no_two_servers_choose_the_same_port(tmp_path: Path) -> None:
    many = [RabbitServer(tmp_path / str(number)) for number in range(50)]
    assert len({server.port for server in many}) == len(many)


def test_rabbitmq_has_the_requested_version(rabbit: RabbitServer) -> None:
    assert rabbit.eval("rabbit_misc:version()") == f'"{rabbit.full_version}"'
    assert rabbit.full_version.startswith(f"{rabbit.version}.")


def test_a_user_has_the_permissions_of_the_patterns(rabbit: RabbitServer) -> None:
    rabbit.create_vhost("a/b é")
    url = rabbit.add_user("reader", "p@ss/word", "^$", "^$", ".*", "a/b é")
    connection = pika.BlockingConnection(pika.URLParameters(url))
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="ACCESS_REFUSED"):
        connection.channel().queue_declare("mine")
    connection.close()
    rabbit.delete_vhost("a/b é")
    assert rabbit.ctl("list_vhosts", "--no-table-headers") == "/"


def test_concurrent_evaluations_are_independent(rabbit: RabbitServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: rabbit.eval(f"{number} + 1"), range(40))) == [
            str(number + 1) for number in range(40)
        ]


def test_a_suspended_rabbitmq_keeps_its_connections_but_does_not_respond(rabbit: RabbitServer) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(rabbit.url()))
    rabbit.suspend()
    try:
        assert {state for _, state in _tree(rabbit)} == {"T"}
        assert not answers_amqp(rabbit.port, seconds=0.2)
    finally:
        rabbit.resume()
    connection.channel().queue_declare("answered", exclusive=True)
    connection.close()


def test_a_killed_rabbitmq_keeps_its_port_and_confirmed_messages(rabbit: RabbitServer) -> None:
    channel = pika.BlockingConnection(pika.URLParameters(rabbit.url())).channel()
    channel.confirm_delivery()
    channel.queue_declare("kept", durable=True, arguments={"x-queue-type": "quorum"})
    channel.basic_publish("", "kept", b"still here")
    rabbit.sync()
    rabbit.kill()
    with pytest.raises(pika.exceptions.AMQPError):
        channel.basic_get("kept")
    rabbit.start()
    connection = pika.BlockingConnection(pika.URLParameters(rabbit.url()))
    assert connection.channel().basic_get("kept", auto_ack=True)[2] == b"still here"
    connection.close()


@pytest.mark.parametrize("version", ["4", "3.10"])
def test_nothing_is_left_after_the_parent_is_killed(version: Version, tmp_path: Path) -> None:
    script = 'echo "$DATABASE_URL $AMQP_URL $PYTHONPATH"; exec sleep 60'
    parent = _start("run", "--rabbitmq", version, "--", "sh", "-c", script, folder=tmp_path)
    assert parent.stdout is not None
    assert [address.partition("://")[0] for address in parent.stdout.readline().split()] == ["postgresql", "amqp"]
    expected = {"postgres", "epmd", "beam.smp", "erl_child_setup", "inet_gethost", "sleep"}
    assert _eventually(lambda: expected <= {_name(pid) for pid in dict(descendants(parent.pid))})
    tree = dict(descendants(parent.pid))
    data = next(Path(_arguments(pid)[2]) for pid in tree if _arguments(pid)[1:2] == ["-D"])
    segment = _shared_memory(data)
    assert segment in _all_shared_memory()
    parent.kill()
    parent.communicate()
    assert _eventually(lambda: not [pid for pid in tree if _name(pid)])
    assert _eventually(lambda: not list(tmp_path.iterdir()) and not data.exists())
    assert segment not in _all_shared_memory()


def test_nothing_is_left_after_the_subreaper_is_killed(tmp_path: Path) -> None:
    server = PostgresServer(tmp_path).start()
    tree = _tree(server)
    assert server._home is not None
    segment = _shared_memory(server._home / "data")
    os.kill(_subreaper_pid(server), signal.SIGKILL)
    assert _eventually(lambda: not [pid for pid, _ in tree if _name(pid)])
    assert not server.running
    assert segment not in _all_shared_memory()


def test_a_suspended_server_does_not_survive_its_parent(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, 'scripts'); from pathlib import Path; from servers import PostgresServer\n"
        f"server = PostgresServer(Path({str(tmp_path)!r})).start(); server.suspend(); print('up', flush=True)\n"
        "sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n"
    tree = dict(descendants(parent.pid))
    parent.kill()
    parent.communicate()
    assert len(tree) > 5
    assert _eventually(lambda: not [pid for pid in tree if _name(pid)])


def test_the_exit_status_of_a_command_is_returned_as_in_shells(capfd: pytest.CaptureFixture[str]) -> None:
    def status(script: str) -> int:
        return wait_for(["sh", "-c", script], {**os.environ, "ADDRESS": "here"})

    assert status('echo "$ADDRESS"; exit 7') == 7
    assert capfd.readouterr().out == "here\n"
    assert status("kill -TERM $$") == 128 + signal.SIGTERM
    assert wait_for(["/nowhere/no-such-command"], {}) == 127


def test_signals_are_passed_on_to_the_command(tmp_path: Path) -> None:
    parent = os.getpid()
    script = f"trap 'echo terminated; exit 5' TERM; kill -TERM {parent}; sleep 60 & wait"
    assert wait_for(["sh", "-c", script], dict(os.environ)) == 5


def test_up_prints_shell_commands_and_down_leaves_nothing(tmp_path: Path) -> None:
    options = ["--folder", str(tmp_path / "folder")]
    first, second = (_start("up", "--rabbitmq", "3.10", *options, folder=tmp_path) for _ in range(2))
    outputs = [process.communicate(timeout=START_SECONDS)[0] for process in (first, second)]
    assert outputs[0] == outputs[1]
    assert "export DATABASE_URL=postgresql://" in outputs[0]
    again = _start("up", *options, folder=tmp_path)  # with another version: the running servers do not change
    assert again.communicate(timeout=EXIT_SECONDS)[0] == outputs[0]
    assert again.returncode == 0
    tree = dict(descendants(int((tmp_path / "folder/supervisor.pid").read_text())))
    assert len(tree) > 10
    down = _start("down", *options, folder=tmp_path)
    down.communicate(timeout=EXIT_SECONDS)
    assert down.returncode == 0
    assert _eventually(lambda: not [pid for pid in tree if _name(pid)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", [*RELEASES.values(), PROMETHEUS, PGBOUNCER, KUBECTL], ids=lambda p: p.cache_name)
def test_programs_are_fetched_only_on_debian(
    program: DebianProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DebianProgram, "is_usable", lambda *_: False)
    monkeypatch.setenv("CLOSEOUT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerError, match="can be fetched only on Debian"):
        program.find()
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_prometheus_scrapes_its_targets_and_refuses_an_invalid_query(tmp_path: Path) -> None:
    port = Port()
    with PrometheusServer(tmp_path, targets={"absent": [f"127.0.0.1:{port.number}"]}) as server:
        assert _eventually(lambda: [row["value"][1] for row in server.query('up{job="absent"}')] == ["0"])
        with pytest.raises(ServerError, match="parse error"):
            server.query("up{")
    assert not server.running


def _start(*words: str, folder: Path) -> subprocess.Popen[str]:
    """Start the command of scripts/services, without the installation, with *folder* for temporary files."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        [*COMMAND, *words], env={**environment, "TMPDIR": str(folder)}, stdout=subprocess.PIPE, text=True
    )


def _subreaper_pid(server: PostgresServer | RabbitServer) -> int:
    assert server._process is not None
    return server._process._subreaper.pid


def _tree(server: PostgresServer | RabbitServer) -> list[tuple[int, str]]:
    return descendants(_subreaper_pid(server))


def _name(pid: int) -> str:
    """Return the name of a process, "" if it has exited, reaped or not."""
    try:
        before, _, after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if after.split()[0] in "ZX" else before.partition("(")[2]


def _arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def _shared_memory(data: Path) -> str:
    """Return the id of the System V segment of this PostgreSQL."""
    return (data / "postmaster.pid").read_text().splitlines()[6].split()[1]


def _all_shared_memory() -> set[str]:
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


def _eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + EXIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
