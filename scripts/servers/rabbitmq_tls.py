"""A certificate as the servers take it: bytes in PEM, made elsewhere."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A chain and its key, and the authority that certificates of the other side must be signed by."""

    chain: bytes
    key: bytes
    authority: bytes

    def files(self) -> dict[str, bytes]:
        """Return the text of each file by its name."""
        return {"cert.pem": self.chain, "key.pem": self.key, "ca.pem": self.authority}
