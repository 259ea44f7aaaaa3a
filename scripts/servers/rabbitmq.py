"""A private RabbitMQ."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from servers import wire
from servers.binaries.rabbitmq import Installation, Version, find_rabbitmq
from servers.binaries.rabbitmq_home import link_home
from servers.ports import Port
from servers.process import Command, ServerError
from servers.rabbitmq_tls import Certificate
from servers.server import Server
from servers.tls_listener import TlsListener

USER = "closeout"
NODE = "x@localhost"
CTL_SECONDS = 120
_CALLS = itertools.count()
LOOPBACK_ONLY = "-kernel inet_dist_use_interface {127,0,0,1}"
LISTENERS = {  # plugins that listen, and the prefix of their settings; what they serve is at `port_of`
    "rabbitmq_management": "management.tcp",
    "rabbitmq_prometheus": "prometheus.tcp",
}


class RabbitError(ServerError):
    """RabbitMQ refused a command: its own words."""


class RabbitServer(Server):
    """RabbitMQ of one line on 127.0.0.1, one node, with an epmd and a cookie of its own.

    *plugins* are enabled from the first start; others cannot be enabled later.
    """

    name = "rabbitmq"
    stop_signal = signal.SIGTERM
    stop_seconds = 60.0  # the management plugin alone takes 5 s

    def __init__(
        self, folder: Path, *, version: Version = "3.10", port: int | None = None, plugins: Sequence[str] = ()
    ) -> None:
        super().__init__(folder)
        self.version = version
        self.node = NODE
        self.plugins = tuple(plugins)
        self._ports = {"amqp": Port(port), "epmd": Port(), "node": Port()}
        self._ports |= {plugin: Port() for plugin in self.plugins if plugin in LISTENERS}
        self.port = self._ports["amqp"].number
        self._files = self.folder / "rabbitmq"
        self._found: Installation | None = None
        self.password = secrets.token_hex(8)

    @property
    def full_version(self) -> str:
        """RabbitMQ's version with its last digits, "4.0.5"."""
        return self._installation().version

    def url(self, vhost: str = "/", *, user: str = USER, password: str | None = None) -> str:
        """Return where to connect; the path is *vhost*, percent-encoded."""
        secret = quote(self.password if password is None else password, safe="")
        return f"amqp://{quote(user, safe='')}:{secret}@127.0.0.1:{self.port}/{quote(vhost, safe='')}"

    def port_of(self, plugin: str) -> int:
        """Return the port that *plugin* listens on: one of `LISTENERS` given as a plugin."""
        return self._ports[plugin].number

    def create_vhost(self, name: str) -> str:
        """Create virtual host *name*, all of it open to the default user, and return its URL."""
        add = f"rabbit_vhost:add({_binary(name)}, {_binary(USER)})"
        # One call: in the tests it is a good part of what a virtual host costs.
        self._call(f"case {add} of ok -> {_permission(USER, name, '.*', '.*', '.*')}; Refused -> Refused end")
        return self.url(name)

    def delete_vhost(self, name: str) -> None:
        """Delete virtual host *name* with its queues; connections to it are closed."""
        self._call(f"rabbit_vhost:delete({_binary(name)}, {_binary(USER)})")

    def add_user(  # noqa: PLR0917 - configure, write, read: the order that rabbitmqctl has
        self, name: str, password: str, configure: str, write: str, read: str, vhost: str = "/"
    ) -> str:
        """Add user *name*, who may do in *vhost* what the patterns allow, and return the user's URL."""
        self._call(f"rabbit_auth_backend_internal:add_user({_binary(name)}, {_binary(password)}, {_binary(USER)})")
        self.permit(name, vhost, configure, write, read)
        return self.url(vhost, user=name, password=password)

    def set_password(self, name: str, password: str) -> None:
        """Give user *name* that password."""
        words = ", ".join(map(_binary, (name, password, USER)))
        self._call(f"rabbit_auth_backend_internal:change_password({words})")

    def permit(self, user: str, vhost: str, *patterns: str, topics: Sequence[Sequence[str]] = ()) -> None:
        """Let *user* do in *vhost* what the *patterns* (configure, write, read) allow.

        *topics*: exchanges, each with the patterns of the routing keys that may be written to it, and bound.
        """
        calls = [_permission(user, vhost, *patterns)]
        calls += [_permission(user, vhost, *topic, of="topic_") for topic in topics]
        self._call(", ".join(calls))

    def _call(self, expression: str) -> None:
        answer = self.eval(expression)
        if answer != "ok" and not answer.startswith("{ok,"):
            raise RabbitError(f"{expression.partition('(')[0]}: {answer}")

    def eval(self, erlang: str) -> str:
        """Evaluate *erlang* inside the node, in about 20 ms, and return the value as Erlang writes it."""
        address = f"127.0.0.1:{self._ports['node'].number}"
        program = self._installation().erlang / "erl_call"
        # Two calls at once, or one right after the other, must not come as the same node.
        caller = f"eval{os.getpid()}x{next(_CALLS)}"
        answer = self._run([str(program), "-address", address, "-h", caller, "-e"], f"{erlang.rstrip().rstrip('.')}.\n")
        if not answer.startswith("{ok, "):
            raise RabbitError(answer)
        return answer.removeprefix("{ok, ").removesuffix("}")

    def open_tls(self, certificate: Certificate, *, clients_must_have_one: bool = False) -> TlsListener:
        """Listen with TLS on one more port, as `listeners.ssl` and `ssl_options` make it, until the server stops."""
        listener = TlsListener(self.eval, Port(), self._files / f"tls-{next(_CALLS)}")
        listener.folder.mkdir()
        listener.show(certificate)
        files = {"certfile": "cert.pem", "keyfile": "key.pem", "cacertfile": "ca.pem"}
        options = "".join(f'{{{option}, "{listener.folder / name}"}}, ' for option, name in files.items())
        options += f"{{verify, verify_peer}}, {{fail_if_no_peer_cert, {str(clients_must_have_one).lower()}}}"
        self.eval("{ok, _} = application:ensure_all_started(ssl)")
        acceptors = "10, 1"
        address = f'{{"127.0.0.1", {listener.port}}}'
        self._call(f"rabbit_networking:start_ssl_listener({address}, [{options}], {acceptors})")
        return listener

    def sync(self) -> None:
        """Write now what RabbitMQ writes some seconds late: that a quorum queue exists.

        Without it a queue declared just before `kill` is there afterwards, but never answers.
        """
        self.eval("[dets:sync(Table) || Table <- dets:all()]")

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl against this node, in about a second, and return what it prints."""
        return self._run([str(self._files / "app/sbin/rabbitmqctl"), "-q", "-n", self.node, *arguments])

    def _run(self, argv: Sequence[str], text: str | None = None) -> str:
        done = subprocess.run(
            argv,
            env=self._environment(),
            input=text if text is not None else "",
            capture_output=True,
            text=True,
            check=False,
            timeout=CTL_SECONDS,
        )
        if done.returncode:
            raise RabbitError(f"{Path(argv[0]).name} failed: {done.stdout}{done.stderr}".strip())
        return done.stdout.strip()

    def _installation(self) -> Installation:
        if self._found is None:
            self._found = find_rabbitmq(self.version)
        return self._found

    def _prepare(self) -> Sequence[Command]:
        found = self._installation()
        link_home(found.home, self._files / "app", self.plugins)
        home = self._files / "home"
        home.mkdir(parents=True, exist_ok=True)
        cookie = home / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(secrets.token_hex(16))
            cookie.chmod(0o400)
        (self._files / "rabbitmq.conf").write_text(self._configuration())
        (self._files / "enabled_plugins").write_text(f"[{','.join(self.plugins)}].\n")
        environment = self._environment()
        epmd = [str(found.erlang / "epmd"), "-port", str(self._ports["epmd"].number), "-address", "127.0.0.1"]
        return [
            Command(argv=epmd, env=environment, cwd=str(self._files)),
            Command(argv=[str(self._files / "app/sbin/rabbitmq-server")], env=environment, cwd=str(self._files)),
        ]

    def _configuration(self) -> str:
        settings = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "default_user": USER,
            "default_pass": self.password,
            # "rss" runs ps every 2.5 seconds, which a minimal machine does not have.
            "vm_memory_calculation_strategy": "allocated",
        }
        for plugin in self.plugins:
            if plugin in LISTENERS:
                settings[f"{LISTENERS[plugin]}.ip"] = "127.0.0.1"
                settings[f"{LISTENERS[plugin]}.port"] = str(self.port_of(plugin))
        return "".join(f"{key} = {value}\n" for key, value in settings.items())

    def _environment(self) -> dict[str, str]:
        """Return an environment without the caller's RABBITMQ_* and ERL_* variables."""
        files = self._files
        return {
            "PATH": f"{self._installation().erlang}:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": str(files / "home"),
            "ERL_EPMD_PORT": str(self._ports["epmd"].number),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self._ports["node"].number),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": str(files / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(files / "advanced.config"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(files / "generated"),
            "RABBITMQ_SCHEMA_DIR": str(files / "schema"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(files / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(files / "data"),
            "RABBITMQ_LOG_BASE": str(files / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(files / "pid"),
            # We run epmd ourselves: a daemon started by Erlang would stay behind.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"{LOOPBACK_ONLY} -start_epmd false",
            "RABBITMQ_CTL_ERL_ARGS": f"{LOOPBACK_ONLY} -start_epmd false",
            "ERL_CRASH_DUMP_SECONDS": "0",  # none: a dump would delay the end by seconds
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes Erlang: one process to signal
        }

    def _answers(self) -> bool:
        return wire.answers_amqp(self.port)


def _permission(user: str, vhost: str, *words: str, of: str = "") -> str:
    return f"rabbit_auth_backend_internal:set_{of}permissions({', '.join(map(_binary, (user, vhost, *words, USER)))})"


def _binary(text: str) -> str:
    """Return *text* as an Erlang binary, whatever characters it has."""
    return f"<<{','.join(str(byte) for byte in text.encode())}>>"
