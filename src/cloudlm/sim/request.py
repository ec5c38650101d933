"""A request and its attempts in virtual time: facts alone.

Must not send, choose or account: ``sending`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloudlm.core.deployment import Endpoint
from cloudlm.gateway.admission import Ticket
from cloudlm.sim.replica import Work
from cloudlm.sim.traffic import Arrival
from cloudlm.sim.versions import Version

if TYPE_CHECKING:
    from cloudlm.sim.sending import Sending


class Request:
    """One request on its way. ``shown`` are tokens that its client has; ``mirrored`` says that a
    revision that is tried out gets a copy of it, ``copy`` that this is one: nobody waits for it."""

    __slots__ = (
        "arrival",
        "attempts",
        "copy",
        "ended",
        "first_at",
        "keys",
        "mirrored",
        "number",
        "resumes",
        "revision",
        "shown",
        "ticket",
        "tried",
        "version",
    )

    def __init__(self, arrival: Arrival, number: int, *, copy: bool = False) -> None:
        self.arrival = arrival
        self.number = number
        self.keys: tuple[bytes, ...] = ()
        self.ticket: Ticket | None = None
        self.tried: set[str] = set()
        self.attempts = 0
        self.resumes = 0
        self.revision = 0
        self.version: Version | None = None
        self.shown = 0
        self.first_at = -1.0
        self.mirrored = False
        self.copy = copy
        self.ended = False

    @property
    def who(self) -> bytes:
        """What draws its revision: its session, or else itself."""
        return self.arrival.session or str(self.number).encode()


class Attempt(Work):
    """One request sent to one replica. ``fails``: its replica answers with an error."""

    __slots__ = ("fails", "open", "replica", "request", "sender", "sent_at", "spoke", "turn")

    def __init__(self, sender: Sending, request: Request, endpoint: Endpoint) -> None:
        arrival = request.arrival
        super().__init__(
            arrival.prompt_tokens + request.shown,
            max(arrival.output_tokens - request.shown, 1),
            arrival.blocks,
            arrival.block_tokens,
        )
        self.sender = sender
        self.request = request
        self.replica = endpoint.replica
        now = sender.timeline.now
        self.turn = sender.loads.begin(endpoint.replica, request.keys, now)
        self.sent_at = now
        self.spoke = -1.0  # when its first token was shown
        self.fails = False
        self.open = True


class Switchboard:
    """Passes on what replicas tell to the gateway that asked."""

    def first_token(self, work: Work) -> None:
        assert isinstance(work, Attempt)
        work.sender.first_token(work)

    def finished(self, work: Work) -> None:
        assert isinstance(work, Attempt)
        work.sender.finished(work)

    def lost(self, work: Work, produced: int) -> None:
        assert isinstance(work, Attempt)
        work.sender.lost(work, produced)
