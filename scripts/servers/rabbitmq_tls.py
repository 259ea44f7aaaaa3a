"""TLS of the private servers: a certificate in PEM, and a RabbitMQ port that speaks TLS."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from servers.ports import Port


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A certificate chain, its key, and the authority that must have signed the certificates of clients."""

    chain: bytes
    key: bytes
    authority: bytes

    def files(self) -> dict[str, bytes]:
        """Return the content of each file by its name."""
        return {"cert.pem": self.chain, "key.pem": self.key, "ca.pem": self.authority}


class TlsListener:
    """A TLS port of a RabbitMQ node and the files of its certificate; *evaluate* runs Erlang in the node."""

    def __init__(self, evaluate: Callable[[str], str], folder: Path) -> None:
        self._evaluate, self._port, self.folder = evaluate, Port(), folder
        self.port = self._port.number
        folder.mkdir()

    def use_certificate(self, certificate: Certificate) -> None:
        """Present *certificate* to new connections from now on, without a restart."""
        for name, content in certificate.files().items():
            (self.folder / name).write_bytes(content)
        self._evaluate("ssl:clear_pem_cache()")
