"""Passing events on unread where they have the form of those before, and counting all the same.

Learns the form of a stream from the events that were read, and looks for it at the head of what
arrives. Keeps the counts of both kinds: pieces with content, the usage that was stated last; the
notes go to the progress in heaps. Must not hand anything over or know replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cloudlm.core.chat import Usage
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.forms import Form, learn
from cloudlm.gateway.progress import Progress

_END = b"\n\n"
_MAX_LESSONS = 6  # a stream that has not one form by then has none
_MISFITS = 3  # so many texts read in a row: the stream has another form now
_MAX_NOTES = 128
Counts = tuple[dict[str, Any] | None, bytes, int]


class Skimmer:
    """For one stream. ``shape`` says what the client gets of a chunk, None if that depends on more
    than the chunk: then every event must be read."""

    def __init__(self, progress: Progress, shape: Callable[[dict[str, Any]], bytes] | None) -> None:
        self._progress = progress
        self._shape = shape
        self._form: Form | None = None
        self._fits = False
        self._lessons = self._misfits = 0
        self._stated: dict[str, Any] | None = None
        self._tokens = b""  # stated since then, as they were written
        self.pieces = 0
        """Chunks with content so far."""

    def skim(self, piece: bytes, out: list[bytes]) -> bytes:
        """Add to ``out`` what the client gets of the events in front that need not be read; what
        is left. ``piece`` must begin where an event may begin."""
        form = self._form
        if form is None:
            return piece
        events = piece.split(_END)
        last = events.pop()
        done = form.take(events, out)
        if not done:
            return piece
        self._fits, self._misfits = True, 0
        self.pieces += form.texts
        form.texts = 0
        if form.says_usage:
            self._stated, self._tokens = form.usage, form.tokens
        if len(form.ids) >= _MAX_NOTES:
            self.settle()
        return last if done == len(events) else _END.join([*events[done:], last])

    def read(self, data: bytes, chunk: dict[str, Any]) -> None:
        """Count a chunk that was read, whose note was taken; ``data`` is what was read."""
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self._stated, self._tokens = usage, b""
        if openai.has_content(chunk):
            self.pieces += 1
            self._misfits += 1
            if self._misfits >= _MISFITS:
                self._fits = False
            if self._shape is not None and not self._fits and self._lessons < _MAX_LESSONS:
                self._lessons += 1
                self._form = learn(data, self._shape) or self._form

    def settle(self) -> None:
        """The progress must know of all that was passed on: before it takes a chunk that was read,
        and before it is asked."""
        form = self._form
        if form is not None and form.ids:
            self._progress.more(form.index, form.ids)
            form.ids.clear()

    def forget(self) -> None:
        """Another replica goes on, perhaps in another form."""
        self.settle()
        self._form, self._fits = None, False
        self._lessons = self._misfits = 0

    def counts(self) -> Counts:
        """What was counted so far, for ``usage_of``."""
        return self._stated, self._tokens, self.pieces


def usage_of(counts: Counts) -> Usage:
    """What counts say. Asked only when somebody wants to know: at every event it would cost more
    than the event."""
    stated, tokens, pieces = counts
    if stated is None:  # a replica that states none: a chunk is a token
        return Usage(completion_tokens=pieces)
    usage = openai.read_usage(stated)
    if not tokens:
        return usage
    return Usage(usage.prompt_tokens, int(tokens), usage.cached_tokens)
