"""A port of RabbitMQ's that speaks TLS."""

from collections.abc import Callable
from pathlib import Path

from servers.ports import Port
from servers.rabbitmq_tls import Certificate


class TlsListener:
    """Where it listens, and the files of its certificate; *evaluate* lets the node carry out an Erlang expression."""

    def __init__(self, evaluate: Callable[[str], str], port: Port, folder: Path) -> None:
        self._evaluate, self._port, self.folder = evaluate, port, folder

    @property
    def port(self) -> int:
        """Return where it listens on 127.0.0.1."""
        return self._port.number

    def show(self, certificate: Certificate) -> None:
        """Show *certificate* to new connections from now on, without a restart."""
        for name, text in certificate.files().items():
            (self.folder / name).write_bytes(text)
        self._evaluate("ssl:clear_pem_cache()")
