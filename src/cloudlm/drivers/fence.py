"""The greatest token that gave orders, noted beside what runs: an order with a smaller one comes
from a control that was overtaken (a fencing token, as in Kleppmann, Designing Data-Intensive
Applications, chapter 8). No process, no asyncio."""

from __future__ import annotations

from pathlib import Path

from cloudlm.core.errors import Superseded
from cloudlm.drivers.runfiles import read_json, write_json


class NotedToken:
    """The token that a file notes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def allows(self, token: int) -> bool:
        """Whether ``token`` is as great as any before; it is then noted. Raises OSError."""
        noted = self.noted()
        if token > noted:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(self._path, {"token": token})
        return token >= noted

    def check(self, token: int) -> None:
        """Raise Superseded unless ``allows``. Raises OSError."""
        if not self.allows(token):
            check_token(token, self.noted())

    def noted(self) -> int:
        """0 if nothing was noted."""
        found = (read_json(self._path) or {}).get("token", 0)
        return found if isinstance(found, int) else 0


def check_token(token: int, noted: int) -> None:
    """Raise Superseded if a greater token was noted."""
    if token < noted:
        raise Superseded(
            f"an order with token {token} comes too late: a control with token {noted} gives the "
            "orders here"
        )
