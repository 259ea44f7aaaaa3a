"""A private RabbitMQ cluster of three nodes."""

import secrets
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from servers.binaries.rabbitmq import DEFAULT_VERSION, find_rabbitmq
from servers.ports import Port
from servers.process import Command, ServerError
from servers.rabbitmq import CONSISTENT_HASH, LOOPBACK_ONLY, RabbitServer
from servers.server import Server, accepts_connections, start_all

NODES = 3
FORMED_SECONDS = 60.0


class Epmd(Server):
    """Erlang's port mapper, through which nodes find each other; a separate server, so that it outlives every node."""

    name = "epmd"
    stop_signal = signal.SIGTERM
    stop_seconds = 5.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._port = Port()
        self.port = self._port.number

    def _prepare(self) -> Sequence[Command]:
        erlang = find_rabbitmq(DEFAULT_VERSION).erlang
        argv = [str(erlang / "epmd"), "-port", str(self.port), "-address", "127.0.0.1"]
        return [Command(argv=argv, env={"PATH": "/usr/bin:/bin"}, cwd=str(self.folder))]

    def _is_ready(self) -> bool:
        return accepts_connections(self.port)


class RabbitNode(RabbitServer):
    """One node of a cluster; *members* are the names of all nodes."""

    def __init__(self, folder: Path, *, node: str, members: Sequence[str], epmd: Epmd, cookie: str) -> None:
        super().__init__(folder, plugins=[CONSISTENT_HASH])
        self.node, self._members, self._epmd, self._cookie = node, members, epmd, cookie

    def _prepare(self) -> Sequence[Command]:
        cookie = self._files / "home" / ".erlang.cookie"
        if not cookie.exists():
            cookie.parent.mkdir(parents=True, exist_ok=True)
            cookie.write_text(self._cookie)
            cookie.chmod(0o400)
        return super()._prepare()[-1:]  # without epmd

    def _configuration(self) -> str:
        lines = ["cluster_formation.peer_discovery_backend = classic_config"]
        lines += [f"cluster_formation.classic_config.nodes.{n} = {name}" for n, name in enumerate(self._members, 1)]
        return super()._configuration() + "\n".join(lines) + "\n"

    def _environment(self) -> dict[str, str]:
        # One scheduler per node: the schedulers of three nodes would busy-wait against each other on two cores.
        return super()._environment() | {
            "ERL_EPMD_PORT": str(self._epmd.port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"{LOOPBACK_ONLY} -start_epmd false +S 1:1",
        }


class RabbitCluster:
    """Three nodes that form one broker."""

    def __init__(self, folder: Path) -> None:
        names = [f"n{number}@localhost" for number in range(1, NODES + 1)]
        self.epmd = Epmd(folder / "epmd")
        cookie, password = secrets.token_hex(16), secrets.token_hex(8)
        self.nodes = [
            RabbitNode(folder / name.partition("@")[0], node=name, members=names, epmd=self.epmd, cookie=cookie)
            for name in names
        ]
        for node in self.nodes:
            node.password = password

    def start(self) -> "RabbitCluster":
        """Start the nodes that are down and return once all nodes form one cluster."""
        if not self.epmd.running:
            self.epmd.start()
        start_all(*(node for node in self.nodes if not node.running))
        deadline = time.monotonic() + FORMED_SECONDS
        while self.any_running.eval("length(rabbit_nodes:list_running())") != str(NODES):
            if time.monotonic() > deadline:
                raise ServerError("the nodes do not form a cluster")
            time.sleep(0.2)
        return self

    def kill(self) -> None:
        """SIGKILL all nodes and epmd."""
        for server in (*self.nodes, self.epmd):
            server.kill()

    @property
    def any_running(self) -> RabbitNode:
        """A running node."""
        return next(node for node in self.nodes if node.running)

    @property
    def ports(self) -> list[int]:
        """The AMQP ports of the nodes."""
        return [node.port for node in self.nodes]

    def leader(self, queue: str, vhost: str) -> RabbitNode:
        """Return the node that leads quorum queue *queue*."""
        leader = self.any_running.eval(
            f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{vhost}">>, queue, <<"{queue}">>)),'
            "{ok, _, {_, Leader}} = ra:members(amqqueue:get_pid(Q)), Leader"
        )
        return next(node for node in self.nodes if node.node == leader.strip("'"))
