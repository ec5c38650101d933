"""Free ports, chosen so that two guards never hand the same one to their commands.

Standard library only (the guard imports it).
"""

from __future__ import annotations

import itertools
import socket


def port_is_free(host: str, port: int) -> bool:
    """True if a server could listen on ``host:port`` now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


class PortReservation:
    """A port that no other guard on this machine chooses: the name of an abstract socket, which the
    kernel gives back when the process ends, however it ends. Kept over restarts of the command, so
    that nobody who remembers the old address finds another model behind it."""

    def __init__(self, host: str, first_port: int) -> None:
        self._host = host
        self._first_port = first_port
        self._next_port = first_port
        self._holder: socket.socket | None = None
        self._port: int | None = None

    def take(self) -> int:
        """The port of last time if it is still free, else the next free one. Raises OSError."""
        if self._port is not None:
            kept = self._port
            if port_is_free(self._host, kept):
                return kept
            self.skip()
        above = range(self._next_port, 65_536)
        below = range(self._first_port, self._next_port)
        for port in itertools.chain(above, below):
            holder = self._reserve(port)
            if holder is not None:
                self._holder, self._port = holder, port
                return port
        raise OSError(f"no free port from {self._first_port} upward on {self._host}")

    def skip(self) -> None:
        """Somebody else has the port: give it up and look above it next time."""
        if self._holder is not None:
            self._holder.close()
            self._holder = None
        if self._port is not None:
            self._next_port = min(self._port + 1, 65_535)
            self._port = None

    def _reserve(self, port: int) -> socket.socket | None:
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            holder.bind(f"\0cloudlm.port.{port}")
        except OSError:
            holder.close()
            return None
        if port_is_free(self._host, port):
            return holder
        holder.close()
        return None
