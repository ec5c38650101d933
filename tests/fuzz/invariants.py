"""What may never be, whatever happened. Must not change what it looks at."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from functools import lru_cache
from typing import Any

from tests.fuzz.replicas import PROMPT_TOKENS, right_answer
from tests.fuzz.schedule import KEYS, Schedule
from tests.fuzz.story import LAST_GOOD_VIEW_S, MARKS, Seen, Story

from cloudlm.core.price import NANO
from cloudlm.core.tenant import Outcome

RETRY_SHARE, RETRY_FLOOR, HEDGE_SHARE = 0.2, 3, 0.05
REVOKED_WITHIN_S = 1.0
REVISIONS = range(1, 10)
_CONTROL_S_OWN = {
    "control_kill",
    "control_pause",
    "driver_down",
    "driver_forgets",
    "driver_late",
    "driver_blank",
}
"""Faults that no request may notice; all of them while the fleet stands still."""
_TAKES_AWAY = {"delete", "recreate"}
_read = lru_cache(16_384)(json.loads)
"""What is said is nearly always what was said before: each is read once."""
_LOOKS_AGAIN_S = 1.0
"""More than a gateway takes to see that the state is back."""
_ONE_REPLICAS = {"crash", "stall", "garbage", "cut", "abort", "error_event"}


def check(story: Story) -> list[tuple[str, str]]:
    """The name of every broken invariant, and how."""
    assert story.upstream is not None
    attempts = Counter(send.request_id for send in story.upstream.sends)
    told = {id(seen): _Told(seen, story) for seen in (*story.seen, *story.probes)}
    for one in told.values():
        _tokens(story, one)
        _ledger(story, one, attempts[one.name] if one.seen.asked else 0)
    _all_served(story, [told[id(seen)] for seen in story.seen])
    for seen in story.probes:
        if not told[id(seen)].complete:
            text = b"".join(seen.pieces)[:200]
            story.note("convergence", f"after all faults: {seen.status} {seen.ended} {text!r}")
    _away(story, [told[id(seen)] for seen in story.seen])
    _retries(story)
    _revoked(story)
    _limits(story, list(told.values()))
    return story.broken


class _Told:
    """What a client was told, read from its bytes."""

    def __init__(self, seen: Seen, story: Story) -> None:
        self.seen = seen
        self.name = f"q{seen.ask.number}"
        self.text = ""
        self.error: dict[str, Any] | None = None
        self.usage: dict[str, Any] | None = None
        self.done = 0
        self.finishes = 0
        self.right = 0
        body = b"".join(seen.pieces)
        if seen.status and seen.stream:
            self._read_stream(body, story)
        elif seen.status:
            fields = _read(body)
            self.error = fields.get("error")
            if self.error is None:
                self.text = fields["choices"][0]["message"]["content"]
                self.usage = fields["usage"]
                self.done = self.finishes = 1
        self.tokens = self._count()

    def _read_stream(self, body: bytes, story: Story) -> None:
        for number, part in enumerate(body.split(b"\n\n")):
            if number and part == b": ping":  # a silent replica; never before the first content
                continue
            data = part.removeprefix(b"data: ")
            if data == b"[DONE]":
                self.done += 1
            elif data:
                try:
                    self._event(_read(data))
                except (ValueError, KeyError, TypeError):
                    story.note("tokens", f"{self.name} was sent {data[:80]!r}")

    def _event(self, event: dict[str, Any]) -> None:
        self.error = event.get("error", self.error)
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            self.text += choice["delta"].get("content") or ""
            self.finishes += choice["finish_reason"] is not None

    def _count(self) -> int | None:
        """How many tokens of the right answer it is; None if it is no beginning of it."""
        ask = self.seen.ask
        found = _place(self.seen.mark, f"prompt {ask.prompt}", ask.max_tokens, self.text)
        if found is None:
            return None
        count, self.right = found
        return count

    @property
    def complete(self) -> bool:
        return self.done == 1 and self.error is None and self.tokens == self.right


@lru_cache(16_384)
def _place(mark: str, prompt: str, most: int, said: str) -> tuple[int, int] | None:
    """How many tokens of a right answer were said, and how many it has; None if of none."""
    for revision in REVISIONS:
        right = right_answer(mark, prompt, revision, most)
        text = ""
        for count, token in enumerate((*right.texts, "")):
            if text == said:
                return count, len(right.texts)
            text += token
    return None


def _tokens(story: Story, told: _Told) -> None:
    """No token lost or doubled, none of another tenant, and no end that is none."""
    name, seen = told.name, told.seen
    if told.tokens is None:
        whose = "tenant" if _anothers(told) else "tokens"
        story.note(whose, f"{name} was told {told.text!r}, no beginning of its own answer")
        return
    if told.done > 1 or told.finishes > 1:
        story.note("tokens", f"{name} ended {told.done} times, finished {told.finishes} times")
    if told.done and (told.error or not told.finishes or told.tokens != told.right):
        story.note("tokens", f"{name} ended as if whole after {told.tokens} of {told.right} tokens")
    if told.done and told.usage and told.usage["completion_tokens"] != told.tokens:
        story.note("usage", f"{name} was told {told.usage} for {told.tokens} tokens")
    if seen.stream and seen.ask.usage and told.done and not told.usage:
        story.note("usage", f"{name} was not told its usage")
    if seen.stream and seen.ended in ("read", "whole") and not told.done and told.error is None:
        story.note("tokens", f"{name} was cut off without a word")
    if told.error is not None and told.error.get("code") == "internal_error":
        story.note("internal", f"{name}: {told.error}")


def _anothers(told: _Told) -> bool:
    """Whether it is the answer of another tenant."""
    ask = told.seen.ask
    marks = set(MARKS.values()) - {told.seen.mark}
    return any(
        told.text.startswith(right_answer(mark, f"prompt {ask.prompt}", revision, 99).texts[0])
        for mark in marks
        for revision in REVISIONS
    )


def _ledger(story: Story, told: _Told, sends: int) -> None:
    """Exactly one row per attempt, and tokens in rows as many as were relayed."""
    name, seen = told.name, told.seen
    rows = story.rows.get(name, [])
    sent = [row for row in rows if row.outcome not in (Outcome.CACHED, Outcome.SEMANTIC)]
    cut_off = seen.left or seen.killed or story.revoked_at is not None
    if not sends <= len(sent) <= sends + cut_off:
        story.note("ledger", f"{name}: {len(sent)} rows for {sends} attempts")
    numbers = sorted(row.attempt for row in rows)
    if numbers != list(range(1, len(rows) + 1)):
        story.note("ledger", f"{name}: attempts {numbers}")
    counted, seen_tokens = sum(row.completion_tokens for row in rows), told.tokens or 0
    if counted != seen_tokens and not (seen.killed and counted < seen_tokens):
        story.note("ledger", f"{name}: {counted} tokens in rows, {seen_tokens} relayed")
    if told.complete and sum(row.prompt_tokens for row in rows) != PROMPT_TOKENS:
        story.note("ledger", f"{name}: prompt tokens {[row.prompt_tokens for row in rows]}")
    finished = sum(row.outcome is Outcome.FINISHED for row in rows)
    if finished > 1 or (told.complete and not seen.killed and not _good(rows)):
        story.note("ledger", f"{name}: outcomes {[row.outcome.value for row in rows]}")
    for row in rows:
        if row.tenant != KEYS[seen.ask.key]:
            story.note("tenant", f"{name} of {KEYS[seen.ask.key]} was accounted to {row.tenant}")


def _good(rows: list[Any]) -> bool:
    return any(row.outcome in (Outcome.FINISHED, Outcome.CACHED) for row in rows)


def _all_served(story: Story, told: list[_Told]) -> None:
    """Where nothing hinders it, every request is answered; and a stream that broke goes on while
    there is a replica that was never ill."""
    schedule = story.schedule
    kinds = {fault.kind for fault in schedule.faults}
    goes_on = schedule.max_resumes > 0 and len(story.ill) == 1 < schedule.replicas
    goes_on = goes_on and kinds <= _ONE_REPLICAS
    goes_on = goes_on and schedule.plane is None  # else a replica may be alone
    calm = schedule.queued > 100 and not kinds - _CONTROL_S_OWN
    calm = calm and not {order.kind for order in schedule.orders} & _TAKES_AWAY
    calm = calm and not _gives_way(schedule)
    for one in told:
        ask = one.seen.ask
        free = ask.key < 2 and not one.seen.left and ask.deadline_ms is None
        if calm and free and not one.complete:
            what = b"".join(one.seen.pieces)[:120]
            story.note("served", f"{one.name} had no answer though nothing failed: {what!r}")
        if goes_on and one.seen.stream and one.text and not one.seen.left and not one.complete:
            story.note("resume", f"{one.name} was not gone on with: {one.error}")


def _gives_way(schedule: Schedule) -> bool:
    """Whether the memory may have no room for what serves beside a version that does not start."""
    crowded = schedule.plane is not None and schedule.plane.fits > 0
    return crowded and any(order.kind == "broken" for order in schedule.orders)


def _away(story: Story, told: list[_Told]) -> None:
    """While the state is away, requests are served by what was read last, and by what is too old
    none is."""
    assert story.upstream is not None
    if not story.away or {fault.kind for fault in story.schedule.faults} != {"state_away"}:
        return
    sent = {send.request_id for send in story.upstream.sends}
    old = [(a + LAST_GOOD_VIEW_S, b) for a, b in story.away if b - a > LAST_GOOD_VIEW_S]
    for one in told:
        seen, ask = one.seen, one.seen.ask
        began, over = seen.began_at, seen.over_at
        near = any(began < b + _LOOKS_AGAIN_S and over > a - _LOOKS_AGAIN_S for a, b in old)
        free = ask.key < 2 and not seen.left and ask.deadline_ms is None
        if free and not near and not one.complete:
            what = b"".join(seen.pieces)[:120]
            story.note("stable", f"{one.name} had no answer while the state was away: {what!r}")
        inside = any(a + _LOOKS_AGAIN_S < began and over < b for a, b in old)
        if inside and (one.name in sent or seen.status != 503):
            story.note("stale", f"{one.name} was served by what was read too long ago")


def _retries(story: Story) -> None:
    """Attempts within 1.2 times the requests, or a floor, for each life of the gateway."""
    assert story.upstream is not None
    first = [send for send in story.upstream.sends if not send.resumed]
    requests = len({send.request_id for send in first})
    most = max(RETRY_FLOOR, RETRY_SHARE * requests) + RETRY_FLOOR * (story.lives - 1)
    if story.schedule.hedge_after_s:
        most += HEDGE_SHARE * requests
    if story.took_s > 60:
        most += RETRY_FLOOR
    if len(first) - requests > most:
        story.note("retries", f"{len(first)} attempts at {requests} requests")
    per_request = Counter(send.request_id for send in first)
    if per_request and max(per_request.values()) > 3:
        story.note("retries", f"{per_request.most_common(1)[0]} attempts")
    resumed = Counter(send.request_id for send in story.upstream.sends if send.resumed)
    if resumed and max(resumed.values()) > story.schedule.max_resumes:
        story.note("retries", f"{resumed.most_common(1)[0]} times gone on with")


def _revoked(story: Story) -> None:
    """A revoked key is refused within a second."""
    calm = not any(fault.kind.startswith("state") for fault in story.schedule.faults)
    if story.revoked_at is None or not calm:
        return
    assert story.upstream is not None
    names = {f"q{ask.number}" for ask in story.schedule.asks if ask.key == 3}
    for send in story.upstream.sends:
        if send.request_id in names and send.at > story.revoked_at + REVOKED_WITHIN_S:
            story.note("revoked", f"{send.request_id} was sent though its key is revoked")


def _limits(story: Story, told: list[_Told]) -> None:
    """What keys may use at most: at once, in a minute, in money; and what replicas hold at once."""
    schedule = story.schedule
    key_of = {one.name: one.seen.ask.key for one in told}
    spent: dict[int, int] = defaultdict(int)
    counted: dict[int, set[str]] = defaultdict(set)
    for name, rows in story.rows.items():
        for row in rows:
            spent[key_of[name]] += row.cost
            counted[key_of[name]].add(name)
    unsure = any(fault.kind.startswith(("state", "lost")) for fault in schedule.faults)
    for key in range(len(KEYS)):
        budget, rate = schedule.spend[key], schedule.per_minute[key]
        if budget is not None and spent[key] > budget * NANO and not (story.lives > 1 and unsure):
            story.note("budget", f"key {key} spent {spent[key] / NANO:.4f} of {budget}")
        short = story.took_s < 60 and story.lives == 1
        if rate is not None and short and len(counted[key]) > rate:
            story.note("limits", f"key {key}: {len(counted[key])} requests a minute of {rate}")
