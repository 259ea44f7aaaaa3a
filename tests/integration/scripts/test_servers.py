"""The private servers that all other tests lean on: they come, they can be hurt, and nothing of them stays."""

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
import pytest
from servers import PostgresServer, PrometheusServer, RabbitServer, ServerError, SqlError
from servers import run as foreground
from servers.binaries.kubectl import Kubectl, find_kubectl
from servers.binaries.prometheus import Prometheus, find_prometheus
from servers.binaries.rabbitmq import Installation, Version, find_rabbitmq
from servers.ports import Port
from servers.subreaper import descendants
from servers.wire import answers_amqp

CHECKOUT = Path(__file__).parents[3]
COMMAND = [sys.executable, str(CHECKOUT / "scripts/servers/__main__.py")]
PATIENCE = 30.0  # seconds; what is waited for takes less than one
START_PATIENCE = 90.0  # seconds for both servers; alone on two cores they take eight


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg")) as server:
        yield server


@pytest.fixture(scope="module", params=["3.10", "4"])
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


async def test_a_suspended_postgres_keeps_its_connections_and_answers_none(postgres: PostgresServer) -> None:
    connection = await asyncpg.connect(postgres.url())
    postgres.suspend()
    try:
        with pytest.raises(TimeoutError):
            await asyncpg.connect(postgres.url(), timeout=0.2)
    finally:
        postgres.resume()
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


def test_a_refused_statement_is_told_with_its_sqlstate(postgres: PostgresServer) -> None:
    with pytest.raises(SqlError, match=r"^42P01 .*nowhere"):
        postgres.psql("SELECT * FROM nowhere")
    with pytest.raises(SqlError, match=r"^3D000 "):
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


def test_a_server_that_cannot_start_says_why(postgres: PostgresServer) -> None:
    postgres.stop()
    postgres.settings["no_such"] = "1"
    with pytest.raises(ServerError, match='unrecognized configuration parameter "no_such"'):
        postgres.start()
    del postgres.settings["no_such"]
    postgres.start()


def test_a_server_does_not_start_on_a_port_that_is_taken(postgres: PostgresServer, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=f"port {postgres.port} is taken"):
        PostgresServer(tmp_path, port=postgres.port).start()


def test_a_start_in_another_thread_outlives_the_thread(postgres: PostgresServer) -> None:
    postgres.stop()
    assert not postgres.running
    thread = threading.Thread(target=postgres.start)
    thread.start()
    thread.join()
    assert postgres.psql("SELECT 1") == "1"


def test_no_two_servers_choose_the_same_port(tmp_path: Path) -> None:
    many = [RabbitServer(tmp_path / str(number)) for number in range(50)]
    assert len({server.port for server in many}) == len(many)


def test_rabbitmq_is_of_the_line_asked_for(rabbit: RabbitServer) -> None:
    assert rabbit.eval("rabbit_misc:version()") == f'"{rabbit.full_version}"'
    assert rabbit.full_version.startswith(f"{rabbit.version}.")


def test_a_user_may_do_what_the_patterns_allow(rabbit: RabbitServer) -> None:
    rabbit.create_vhost("a/b é")
    url = rabbit.add_user("reader", "p@ss/word", "^$", "^$", ".*", "a/b é")
    connection = pika.BlockingConnection(pika.URLParameters(url))
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="ACCESS_REFUSED"):
        connection.channel().queue_declare("mine")
    connection.close()
    rabbit.delete_vhost("a/b é")
    assert rabbit.ctl("list_vhosts", "--no-table-headers") == "/"


def test_evaluations_at_the_same_time_do_not_disturb_each_other(rabbit: RabbitServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: rabbit.eval(f"{number} + 1"), range(40))) == [
            str(number + 1) for number in range(40)
        ]


def test_a_suspended_rabbitmq_keeps_its_connections_and_answers_none(rabbit: RabbitServer) -> None:
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


@pytest.mark.parametrize("version", ["3.10", "4"])
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


def test_nothing_is_left_after_the_keeper_is_killed(tmp_path: Path) -> None:
    server = PostgresServer(tmp_path).start()
    tree = _tree(server)
    assert server._home is not None
    segment = _shared_memory(server._home / "data")
    os.kill(_keeper(server), signal.SIGKILL)
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


def test_the_status_of_a_command_is_returned_as_shells_do(capfd: pytest.CaptureFixture[str]) -> None:
    def status(script: str) -> int:
        return foreground.wait_for(["sh", "-c", script], {**os.environ, "ADDRESS": "here"})

    assert status('echo "$ADDRESS"; exit 7') == 7
    assert capfd.readouterr().out == "here\n"
    assert status("kill -TERM $$") == 128 + signal.SIGTERM
    assert foreground.wait_for(["/nowhere/no-such-command"], {}) == 127


def test_a_command_that_is_asked_to_end_is_asked_itself(tmp_path: Path) -> None:
    parent = os.getpid()
    script = f"trap 'echo asked; exit 5' TERM; kill -TERM {parent}; sleep 60 & wait"
    assert foreground.wait_for(["sh", "-c", script], dict(os.environ)) == 5


def test_up_prints_what_a_shell_can_evaluate_and_down_leaves_nothing(tmp_path: Path) -> None:
    there = ["--folder", str(tmp_path / "folder")]
    first, second = (_start("up", "--rabbitmq", "4", *there, folder=tmp_path) for _ in range(2))
    outputs = [process.communicate(timeout=START_PATIENCE)[0] for process in (first, second)]
    assert outputs[0] == outputs[1]
    assert "export DATABASE_URL=postgresql://" in outputs[0]
    tree = dict(descendants(int((tmp_path / "folder/supervisor.pid").read_text())))
    assert len(tree) > 10
    down = _start("down", *there, folder=tmp_path)
    down.communicate(timeout=PATIENCE)
    assert down.returncode == 0
    assert _eventually(lambda: not [pid for pid in tree if _name(pid)])
    assert not list(tmp_path.iterdir())


def test_a_machine_without_apt_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Installation, "offers", lambda *_: False)
    monkeypatch.setenv("CLOSEOUT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerError, match="only be fetched on Debian"):
        find_rabbitmq("3.10")
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(("program", "find"), [(Prometheus, find_prometheus), (Kubectl, find_kubectl)])
def test_prometheus_and_kubectl_too_are_fetched_only_on_debian(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: type, find: Callable[[], object]
) -> None:
    monkeypatch.setattr(program, "is_usable", False)
    monkeypatch.setenv("CLOSEOUT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerError, match="only be fetched on Debian"):
        find()
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_prometheus_scrapes_what_it_is_told_and_refuses_a_broken_query(tmp_path: Path) -> None:
    port = Port()
    with PrometheusServer(tmp_path, targets={"nobody": [f"127.0.0.1:{port.number}"]}) as server:
        assert _eventually(lambda: [row["value"][1] for row in server.query('up{job="nobody"}')] == ["0"])
        with pytest.raises(ServerError, match="parse error"):
            server.query("up{")
    assert not server.running


def _start(*words: str, folder: Path) -> subprocess.Popen[str]:
    """Start scripts/services, past its installation, with *folder* for what is temporary."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        [*COMMAND, *words], env={**environment, "TMPDIR": str(folder)}, stdout=subprocess.PIPE, text=True
    )


def _keeper(server: PostgresServer | RabbitServer) -> int:
    assert server._process is not None
    return server._process._keeper.pid


def _tree(server: PostgresServer | RabbitServer) -> list[tuple[int, str]]:
    return descendants(_keeper(server))


def _name(pid: int) -> str:
    """Return the name of a process, nothing if it has ended, collected by its parent or not."""
    try:
        before, _, after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if after.split()[0] in "ZX" else before.partition("(")[2]


def _arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def _shared_memory(data: Path) -> str:
    """Return the number of the System V segment that this PostgreSQL has."""
    return (data / "postmaster.pid").read_text().splitlines()[6].split()[1]


def _all_shared_memory() -> set[str]:
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


def _eventually(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
