"""Planted bugs: mistakes that somebody could make, put into the production code one at a time.

Each is a few lines over a method of it, for as long as a run lasts; production holds no switch for
any of them. That every one is caught shows that the invariants bite.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any
from unittest import mock

from msgspec.structs import replace
from tests.fuzz.bugs_control import CONTROL_BUGS
from tests.fuzz.planting import Bug, both, instead, nothing
from tests.fuzz.run import Verdict, judge
from tests.fuzz.schedule import draw

from cloudlm.core.errors import CloudlmError, Unavailable
from cloudlm.core.tenant import Outcome
from cloudlm.gateway import hedge, limiter, recall
from cloudlm.gateway.account import Attempt
from cloudlm.gateway.capacity import Capacities
from cloudlm.gateway.errands import Errands
from cloudlm.gateway.exchange import unique
from cloudlm.gateway.flight import Recorded
from cloudlm.gateway.gate import Gate
from cloudlm.gateway.interrupt import Interrupt
from cloudlm.gateway.journal import Journal
from cloudlm.gateway.ledger import Ledger
from cloudlm.gateway.limiter import Limiter
from cloudlm.gateway.limits import Tally
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.progress import _Choice
from cloudlm.gateway.relay import Relay
from cloudlm.gateway.resume import Resumer, may_help
from cloudlm.gateway.retry import RetryBudget
from cloudlm.gateway.router import choose
from cloudlm.gateway.sse import PING, SseParser
from cloudlm.gateway.view import View
from cloudlm.security.access import Directory


def _one_token_less(body: Any) -> Any:
    def less(self: _Choice, index: int) -> dict[str, Any]:
        told: dict[str, Any] = body(self, index)
        if told.get("token_ids"):
            told["token_ids"] = told["token_ids"][:-1]
        return told

    return less


def _one_token_more(body: Any) -> Any:
    def more(self: _Choice, index: int) -> dict[str, Any]:
        told: dict[str, Any] = body(self, index)
        if told.get("token_ids"):
            told["token_ids"] = [*told["token_ids"], 1]
        return told

    return more


def _half_a_comment(_: Any) -> Any:
    def half(self: Relay) -> None:
        self._ready.append(PING.removesuffix(b"\n"))

    return half


def _only_good_ones(settle: Any) -> Any:
    def settled(self: Attempt, outcome: Outcome, status: int) -> None:
        if outcome is Outcome.CANCELLED and not self._settled:
            self._on_settled()
            self._settled = True
            self._ledger._open.pop(self.id, None)
        else:
            settle(self, outcome, status)

    return settled


def _two_rows(add: Any) -> Any:
    def twice(self: Ledger, row: Any) -> None:
        add(self, row)
        if row.outcome is Outcome.FAILED:
            add(self, replace(row, id=unique()))

    return twice


def _any_revision(_: Any) -> Any:
    def chosen(self: Resumer, tried: Any, error: CloudlmError) -> Any:
        rooms = self._rooms
        model = rooms.view.snapshot().models.get(self._call.model)
        there = model.endpoints if model is not None else ()
        found = choose(there, rooms.loads, rooms.clock.monotonic(), tried=tried)
        if found is None:
            raise error
        return found

    return chosen


def _any_attempts(_: Any) -> Any:
    def may(self: Errands, exchange: Any, call: Any, error: Any, tried: Any, budget: Any) -> bool:
        return may_help(error)

    return may


def _end_is_an_end(read: Any) -> Any:
    async def once(self: Relay, timeout_s: float) -> None:
        piece = await self._answer.piece(timeout_s)
        if piece:
            self._feed(piece)
        else:
            self._finished = True

    return once


def _line_left_open(close: Any) -> Any:
    def closed(self: Relay, error: CloudlmError) -> None:
        kept, self._answer = self._answer, mock.Mock()
        close(self, error)
        self._answer = kept

    return closed


def _only_whole_pieces(feed: Any) -> Any:
    def fed(self: SseParser, piece: bytes) -> Any:
        return feed(SseParser(), piece)

    return fed


def _new_ids(read: Any) -> Any:
    return lambda self, segment: [replace(row, id=unique()) for row in read(self, segment)]


def _swallowed(write: Any) -> Any:
    async def tried(self: Ledger, rows: Any) -> None:
        with contextlib.suppress(CloudlmError, OSError):
            await write(self, rows)

    return tried


def _first_view_for_ever(look: Any) -> Any:
    async def once(self: View) -> bool:
        return True if self._snapshot is not None else await look(self)

    return once


def _whatever_was_read(_: Any) -> Any:
    return lambda self: self._snapshot


def _only_what_is_fresh(snapshot: Any) -> Any:
    def fresh(self: View) -> Any:
        if self._failing:
            raise Unavailable("the state is away")
        return snapshot(self)

    return fresh


def _no_money_reserved(estimate: Any) -> Any:
    return lambda *a, **k: estimate(*a, **k)._replace(spend=0)


def _counted_none(reserve: Any) -> Any:
    def reserved(self: Tally, *a: Any, **k: Any) -> Any:
        verdict = reserve(self, *a, **k)
        for facts in self._used.values():
            facts.requests.total = 0
        return verdict

    return reserved


def _none_ongoing(reserve: Any) -> Any:
    def reserved(self: Tally, *a: Any, **k: Any) -> Any:
        for facts in self._used.values():
            facts.ongoing = 0
        return reserve(self, *a, **k)

    return reserved


def _never_ends(_: Any) -> Any:
    async def ended(tasks: Any) -> None:
        return

    return ended


def _kept_when_broken(_: Any) -> Any:
    async def closed(self: Recorded) -> None:
        pieces = b"".join(self._pieces)
        await self._stream.aclose()
        self._tell(pieces)

    return closed


GATEWAY_BUGS: Mapping[str, Bug] = {
    "place never given back": nothing(Gate, "_leave"),
    "waiting ones are not told": nothing(Gate, "_let_in"),
    "capacity is not looked at": nothing(Capacities, "of", 10**9),
    "load never given back": nothing(Loads, "end"),
    "lease never settled": nothing(Limiter, "_settle"),
    "money is not reserved": instead(limiter, "estimate", _no_money_reserved),
    "requests a minute not counted": instead(Tally, "reserve", _counted_none),
    "requests at once not counted": instead(Tally, "reserve", _none_ongoing),
    "resumed one token too early": instead(_Choice, "body", _one_token_less),
    "resumed one token too late": instead(_Choice, "body", _one_token_more),
    "resumed on another revision": instead(Resumer, "_choose", _any_revision),
    "tokens of a resumed stream twice": instead(
        Relay, "_share", lambda _: lambda self: self._usage()
    ),
    "no row for a cancelled attempt": instead(Attempt, "settle", _only_good_ones),
    "two rows for a failed attempt": instead(Ledger, "add", _two_rows),
    "rows lost while the state is down": instead(Ledger, "_write", _swallowed),
    "replayed rows get new ids": instead(Journal, "read", _new_ids),
    "open attempts of the dead forgotten": nothing(Journal, "_close_orphans"),
    "retries without a budget": nothing(RetryBudget, "take", True),
    "retries without an end": instead(Errands, "_may_retry", _any_attempts),
    "a cut stream counts as whole": instead(Relay, "_read", _end_is_an_end),
    "a broken stream ends without a word": instead(
        Relay, "_tell", lambda _: lambda self, error: setattr(self, "_told", True)
    ),
    "a comment runs into the next event": instead(Relay, "_beat", _half_a_comment),
    "events across pieces are lost": instead(SseParser, "feed", _only_whole_pieces),
    "the replica is not told of the end": instead(Relay, "_close", _line_left_open),
    "a client that left is not noticed": nothing(Interrupt, "cut"),
    "a hedge's loser goes on": instead(hedge, "_end", _never_ends),
    "cached answers are shared by all": both(
        nothing(recall.keys, "answer_key", b"k" * 32),
        nothing(recall.keys, "cache_salt", "salt"),
    ),
    "half an answer is cached": instead(Recorded, "aclose", _kept_when_broken),
    "those who wait for an answer are left": nothing(recall.Question, "_left"),
    "a revoked key is still known": both(
        nothing(Directory, "alive", True), nothing(Directory, "stands", True)
    ),
    "an old view is served for ever": instead(View, "snapshot", _whatever_was_read),
    "nothing is served without the state": instead(View, "snapshot", _only_what_is_fresh),
    "the view is never read again": instead(View, "_look", _first_view_for_ever),
}


BUGS: Mapping[str, Bug] = {**GATEWAY_BUGS, **CONTROL_BUGS}


def caught(name: str, most_seeds: int, first: int = 0) -> Verdict | None:
    """The first seed from ``first`` on in which the bug breaks an invariant. A bug of control is
    looked for where there is a control."""
    with BUGS[name]():
        for seed in range(first, first + most_seeds):
            schedule = draw(seed)
            if name in CONTROL_BUGS and schedule.plane is None:
                continue
            verdict = judge(schedule)
            if verdict.broken:
                return verdict
    return None
