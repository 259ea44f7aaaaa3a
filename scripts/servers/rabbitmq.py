"""A private RabbitMQ."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import subprocess
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from servers.binaries.rabbitmq import DEFAULT_VERSION, Installation, Version, find_rabbitmq
from servers.binaries.rabbitmq_home import link_home
from servers.ports import Port
from servers.process import Command, ServerError
from servers.rabbitmq_tls import Certificate, TlsListener
from servers.server import Server, answers_amqp

USER = "closeout"
NODE = "x@localhost"
CTL_SECONDS = 120
_CALLS = itertools.count()
LOOPBACK_ONLY = "-kernel inet_dist_use_interface {127,0,0,1}"
CONSISTENT_HASH = "rabbitmq_consistent_hash_exchange"  # what INTAKE_QUEUES above 1 needs
LISTENERS = {  # plugins that listen on `port_of`, with the prefix of their settings
    "rabbitmq_management": "management.tcp",
    "rabbitmq_prometheus": "prometheus.tcp",
}


class RabbitError(ServerError):
    """RabbitMQ refused a command; the message is its output."""


class RabbitServer(Server):
    """One RabbitMQ node on 127.0.0.1 with a separate epmd and cookie.

    *plugins* are enabled; no other plugin can be enabled later.
    """

    name = "rabbitmq"
    stop_signal = signal.SIGTERM
    stop_seconds = 60.0  # the management plugin alone takes 5 s

    def __init__(
        self,
        folder: Path,
        *,
        version: Version = DEFAULT_VERSION,
        port: int | None = None,
        plugins: Sequence[str] = (),
    ) -> None:
        super().__init__(folder)
        self.version = version
        self.node = NODE
        self.plugins = tuple(plugins)
        self._ports = {"amqp": Port(port), "epmd": Port(), "node": Port()}
        self._ports |= {plugin: Port() for plugin in self.plugins if plugin in LISTENERS}
        self.port = self._ports["amqp"].number
        self._files = self.folder / "rabbitmq"
        self.password = secrets.token_hex(8)

    @property
    def full_version(self) -> str:
        """The complete version, for example "4.0.5"."""
        return self._installation.version

    def url(self, vhost: str = "/", *, user: str = USER, password: str | None = None) -> str:
        """Return the URL of *vhost*."""
        secret = quote(self.password if password is None else password, safe="")
        return f"amqp://{quote(user, safe='')}:{secret}@127.0.0.1:{self.port}/{quote(vhost, safe='')}"

    def port_of(self, plugin: str) -> int:
        """Return the port of *plugin*, which is one of `LISTENERS` and enabled."""
        return self._ports[plugin].number

    def create_vhost(self, name: str) -> str:
        """Create virtual host *name* with all permissions for the default user, and return its URL."""
        add = f"rabbit_vhost:add({_binary(name)}, {_binary(USER)})"
        # One call instead of two: calls take most of the time of a virtual host in the tests.
        self._call(f"case {add} of ok -> {_permission(USER, name, '.*', '.*', '.*')}; Refused -> Refused end")
        return self.url(name)

    def delete_vhost(self, name: str) -> None:
        """Delete virtual host *name* with its queues, and close its connections."""
        self._call(f"rabbit_vhost:delete({_binary(name)}, {_binary(USER)})")

    def add_user(  # noqa: PLR0917 - configure, write, read: the order of rabbitmqctl
        self, name: str, password: str, configure: str, write: str, read: str, vhost: str = "/"
    ) -> str:
        """Add user *name* with these permissions in *vhost*, and return the URL of the user."""
        self._call(f"rabbit_auth_backend_internal:add_user({_binary(name)}, {_binary(password)}, {_binary(USER)})")
        self.permit(name, vhost, configure, write, read)
        return self.url(vhost, user=name, password=password)

    def set_password(self, name: str, password: str) -> None:
        """Change the password of user *name*."""
        arguments = ", ".join(map(_binary, (name, password, USER)))
        self._call(f"rabbit_auth_backend_internal:change_password({arguments})")

    def permit(self, user: str, vhost: str, *patterns: str, topics: Sequence[Sequence[str]] = ()) -> None:
        """Set the permissions of *user* in *vhost*: *patterns* for configure, write, read.

        *topics*: exchanges, each with the patterns for the routing keys to write and to read.
        """
        calls = [_permission(user, vhost, *patterns)]
        calls += [_permission(user, vhost, *topic, of="topic_") for topic in topics]
        self._call(", ".join(calls))

    def _call(self, expression: str) -> None:
        result = self.eval(expression)
        if result != "ok" and not result.startswith("{ok,"):
            raise RabbitError(f"{expression.partition('(')[0]}: {result}")

    def eval(self, erlang: str) -> str:
        """Evaluate *erlang* inside the node, in about 20 ms, and return the value in Erlang syntax."""
        address = f"127.0.0.1:{self._ports['node'].number}"
        program = self._installation.erlang / "erl_call"
        # The node rejects two concurrent or successive callers of the same name.
        caller = f"eval{os.getpid()}x{next(_CALLS)}"
        result = self._run([str(program), "-address", address, "-h", caller, "-e"], f"{erlang.rstrip().rstrip('.')}.\n")
        if not result.startswith("{ok, "):
            raise RabbitError(result)
        return result.removeprefix("{ok, ").removesuffix("}")

    def open_tls(self, certificate: Certificate, *, clients_must_have_one: bool = False) -> TlsListener:
        """Listen with TLS on another port, as with `listeners.ssl` and `ssl_options`, until the server stops."""
        listener = TlsListener(self.eval, self._files / f"tls-{next(_CALLS)}")
        listener.use_certificate(certificate)
        files = {"certfile": "cert.pem", "keyfile": "key.pem", "cacertfile": "ca.pem"}
        options = "".join(f'{{{option}, "{listener.folder / name}"}}, ' for option, name in files.items())
        options += f"{{verify, verify_peer}}, {{fail_if_no_peer_cert, {str(clients_must_have_one).lower()}}}"
        self.eval("{ok, _} = application:ensure_all_started(ssl)")
        self._call(f'rabbit_networking:start_ssl_listener({{"127.0.0.1", {listener.port}}}, [{options}], 10, 1)')
        return listener

    def sync(self) -> None:
        """Flush the metadata of quorum queues, which RabbitMQ writes with a delay of some seconds.

        Without it, a queue that was declared just before `kill` exists after the restart but never responds.
        """
        self.eval("[dets:sync(Table) || Table <- dets:all()]")

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on this node, in about a second, and return its output."""
        return self._run([str(self._files / "app/sbin/rabbitmqctl"), "-q", "-n", self.node, *arguments])

    def _run(self, argv: Sequence[str], text: str = "") -> str:
        env = self._environment()
        done = subprocess.run(
            argv, env=env, input=text, capture_output=True, text=True, check=False, timeout=CTL_SECONDS
        )
        if done.returncode:
            raise RabbitError(f"{Path(argv[0]).name} failed: {done.stdout}{done.stderr}".strip())
        return done.stdout.strip()

    @cached_property
    def _installation(self) -> Installation:
        return find_rabbitmq(self.version)

    def _prepare(self) -> Sequence[Command]:
        found = self._installation
        link_home(found.home, self._files / "app", self.plugins)
        home = self._files / "home"
        home.mkdir(parents=True, exist_ok=True)
        cookie = home / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(secrets.token_hex(16))
            cookie.chmod(0o400)
        (self._files / "rabbitmq.conf").write_text(self._configuration())
        (self._files / "enabled_plugins").write_text(f"[{','.join(self.plugins)}].\n")
        epmd = [str(found.erlang / "epmd"), "-port", str(self._ports["epmd"].number), "-address", "127.0.0.1"]
        server = [str(self._files / "app/sbin/rabbitmq-server")]
        return [Command(argv=argv, env=self._environment(), cwd=str(self._files)) for argv in (epmd, server)]

    def _configuration(self) -> str:
        settings = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "default_user": USER,
            "default_pass": self.password,
            # "rss" runs ps every 2.5 seconds, and a minimal machine has no ps.
            "vm_memory_calculation_strategy": "allocated",
        }
        for plugin in self.plugins:
            if plugin in LISTENERS:
                settings[f"{LISTENERS[plugin]}.ip"] = "127.0.0.1"
                settings[f"{LISTENERS[plugin]}.port"] = str(self.port_of(plugin))
        return "".join(f"{key} = {value}\n" for key, value in settings.items())

    def _environment(self) -> dict[str, str]:
        """Return an environment without the RABBITMQ_* and ERL_* variables of the caller."""
        files = self._files
        return {
            "PATH": f"{self._installation.erlang}:/usr/bin:/bin",
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
            # `_prepare` starts epmd: a daemon that Erlang starts would outlive the server.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"{LOOPBACK_ONLY} -start_epmd false",
            "RABBITMQ_CTL_ERL_ARGS": f"{LOOPBACK_ONLY} -start_epmd false",
            "ERL_CRASH_DUMP_SECONDS": "0",  # no dump: it would delay the exit by seconds
            "RUNNING_UNDER_SYSTEMD": "true",  # the script execs Erlang: one process to signal
        }

    def _is_ready(self) -> bool:
        return answers_amqp(self.port)


def _permission(user: str, vhost: str, *patterns: str, of: str = "") -> str:
    arguments = ", ".join(map(_binary, (user, vhost, *patterns, USER)))
    return f"rabbit_auth_backend_internal:set_{of}permissions({arguments})"


def _binary(text: str) -> str:
    """Return *text* as an Erlang binary."""
    return f"<<{','.join(str(byte) for byte in text.encode())}>>"
