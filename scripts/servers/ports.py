"""Ports of 127.0.0.1 that stay reserved, also while the server is down."""

import random
import socket
import weakref

# Below the kernel's range for outgoing connections (32768 and up): any client could take a port of that range
# while the server is down, and the server could not start again.
LOWEST, HIGHEST = 15_000, 32_000
ATTEMPTS = 500


class Port:
    """A TCP port that no other `Port` on this machine uses as long as this object lives."""

    def __init__(self, number: int | None = None) -> None:
        self.number = _take(self) if number is None else number


def _take(owner: Port) -> int:
    for number in random.sample(range(LOWEST, HIGHEST), ATTEMPTS):
        claim = _claim(number)
        if claim is not None:
            weakref.finalize(owner, claim.close)
            if is_free(number):
                return number
    raise OSError(f"no free port of 127.0.0.1 found between {LOWEST} and {HIGHEST}")


def _claim(number: int) -> socket.socket | None:
    """Reserve *number* by an abstract unix socket, which leaves no file and ends with the process."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0closeout-port-{number}")
    except OSError:
        claim.close()
        return None
    return claim


def is_free(number: int) -> bool:
    """Return whether a server can listen on *number*."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
        try:
            probe.bind(("127.0.0.1", number))
        except OSError:
            return False
        return True
