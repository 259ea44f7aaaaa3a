"""Private authorities and certificates, valid, expired and untrusted; created in each test session."""

from datetime import UTC, datetime
from pathlib import Path

import trustme
from servers.rabbitmq_tls import Certificate

HERE = "127.0.0.1"
STARTED, ENDED = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
# ENDED in the format of the error messages.
EXPIRED_ON = "2026-02-01 00:00:00Z"


class Authority:
    """An authority, and the folder of the files that a worker's URLs name."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir()
        self._folder, self._authority = folder, trustme.CA(organization_name=name)
        self.file = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.file))

    def certificate(self, *hosts: str, trusts: "Authority | None" = None, expired: bool = False) -> Certificate:
        """Return a certificate for *hosts*; its server trusts the clients of *trusts*, by default this authority's."""
        made = self._authority.issue_cert(
            *hosts, common_name=hosts[0], not_before=_from(expired), not_after=_until(expired)
        )
        return _as_files(made, (trusts or self).file.read_bytes())

    def identity(self, name: str, *, user: str, expired: bool = False) -> tuple[Path, Path]:
        """Write a client's certificate and key for *user* to files of this *name*, replacing existing ones."""
        made = self._authority.issue_cert(
            "worker.example", common_name=user, not_before=_from(expired), not_after=_until(expired)
        )
        files = _as_files(made, b"")
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        cert.write_bytes(files.chain)
        key.write_bytes(files.key)
        return cert, key


def _as_files(made: trustme.LeafCert, authority: bytes) -> Certificate:
    chain = b"".join(each.bytes() for each in made.cert_chain_pems)
    return Certificate(chain=chain, key=made.private_key_pem.bytes(), authority=authority)


def _from(expired: bool) -> datetime | None:  # noqa: FBT001 - None is trustme's own choice
    return STARTED if expired else None


def _until(expired: bool) -> datetime | None:  # noqa: FBT001 - as above
    return ENDED if expired else None
