"""Copies for a mirrored revision in virtual time, as ``gateway.mirror`` makes them: after the
fact, a few at once, under the key ``MIRROR_KEY``, each with its row. Must not touch the request
that it copies.
"""

from __future__ import annotations

from collections.abc import Callable

from cloudlm.gateway.mirror import AT_ONCE, is_copied
from cloudlm.sim.picture import Picture
from cloudlm.sim.request import Request


class Copies:
    """The copies of one gateway process. ``send`` has one sent."""

    def __init__(self, picture: Picture, send: Callable[[Request], None]) -> None:
        self._picture = picture
        self._send = send
        self._under_way = 0

    def watch(self, request: Request) -> None:
        """A request is about to be served."""
        beside = self._picture.beside
        if beside:
            request.mirrored = is_copied(beside, request.who, self._picture.model.name)

    def begin(self, request: Request) -> None:
        """A request that falls to the mirror was answered well."""
        if self._under_way < AT_ONCE:
            self._under_way += 1
            self._send(Request(request.arrival, request.number, copy=True))

    def end(self) -> None:
        """A copy is over."""
        self._under_way -= 1
