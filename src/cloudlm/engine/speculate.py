"""Guesses how a text goes on by looking up where its last words stood before (prompt lookup).

Several guessed tokens are computed in one step together with the last known one; those that equal
what would have been generated anyway are kept, so the answer is the same and only comes sooner. The
idea is Saxena's, "Prompt Lookup Decoding", 2023; checking drafts in one pass is Leviathan et al.,
"Fast Inference from Transformers via Speculative Decoding", 2023. Since a draw is keyed by seed and
position, the check is plain equality. Pure: must not import torch, asyncio, time or threading.
"""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloudlm.core.errors import BadSetting

Tokens = NDArray[np.int64]

# A pause after misses in a row is at most so many steps: what it costs to notice late that a text
# has begun to repeat, against what guessing in vain costs a text that never does.
LONGEST_PAUSE_STEPS = 31

# Earlier places of the last token that are compared, the latest first: bounds the time per step.
_MOST_PLACES = 4096


@dataclass(frozen=True, slots=True)
class Lookup:
    """``tokens`` are guessed at most at a time, where at least the last ``shortest`` tokens stood
    before; the place with most in common wins, up to ``longest`` tokens. Raises BadSetting."""

    tokens: int
    shortest: int
    longest: int

    def __post_init__(self) -> None:
        if min(self.tokens, self.shortest) < 1:
            raise BadSetting(
                "num_speculative_tokens and prompt_lookup_min must be at least 1",
                param="num_speculative_tokens" if self.tokens < 1 else "prompt_lookup_min",
            )
        if self.shortest > self.longest:
            raise BadSetting(
                f"prompt_lookup_min = {self.shortest} must not be more than prompt_lookup_max = "
                f"{self.longest}; lower the one or raise the other",
                param="prompt_lookup_min",
            )


class Drafter:
    """Guesses for one sequence. ``propose`` before a step, ``judge`` after one with a draft.

    Drafts grow while they are right and shrink to what was right; after misses in a row it pauses,
    longer each time, so that a text which does not repeat itself is not slowed down.
    """

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._tokens: Tokens = np.empty(256, dtype=np.int64)
        self._known = 0
        self._length = lookup.tokens
        self._misses = 0
        self._pause_steps = 0

    def propose(self, token_ids: Listing[int], most: int) -> tuple[int, ...]:
        """At most ``most`` tokens that may follow ``token_ids``, which only ever grow."""
        if self._pause_steps > 0:
            self._pause_steps -= 1
            return ()
        self._note(token_ids)
        known = self._tokens[: self._known]
        place = find_continuation(known, self._lookup.shortest, self._lookup.longest)
        if place is None:
            return ()
        # What is copied may run into the copy itself: a text of one period goes on for ever.
        period = self._known - place
        count = min(most, self._length)
        return tuple(int(known[place + at % period]) for at in range(count))

    def judge(self, drafted: int, accepted: int) -> None:
        """So many of the tokens of the last draft were right."""
        if accepted == drafted:
            self._length = min(self._lookup.tokens, max(self._length, 2 * drafted))
        else:
            self._length = accepted + 1
        self._misses = 0 if accepted else self._misses + 1
        if self._misses:
            self._pause_steps = min(2**self._misses - 1, LONGEST_PAUSE_STEPS)

    def _note(self, token_ids: Listing[int]) -> None:
        count = len(token_ids)
        if count > len(self._tokens):
            grown = np.empty(2 * count, dtype=np.int64)
            grown[: self._known] = self._tokens[: self._known]
            self._tokens = grown
        self._tokens[self._known : count] = token_ids[self._known :]
        self._known = count


def find_continuation(tokens: Tokens, shortest: int, longest: int) -> int | None:
    """The position behind that earlier occurrence of the end of ``tokens`` which has most of it in
    common (the latest of several), if that is at least ``shortest`` tokens; more than ``longest``
    count as ``longest``."""
    last = len(tokens) - 1
    if last < 1:
        return None
    ends = np.flatnonzero(tokens[:last] == tokens[last])[-_MOST_PLACES:]
    common = 1 if len(ends) else 0
    while 0 < common < longest:
        reach = ends[ends >= common]
        longer = reach[tokens[reach - common] == tokens[last - common]]
        if not len(longer):
            break
        ends, common = longer, common + 1
    return int(ends[-1]) + 1 if common >= shortest else None


def agreed(drafted: Listing[int], chosen: Listing[int]) -> int:
    """How many tokens of a draft are what was chosen at their places."""
    count = 0
    while count < len(drafted) and drafted[count] == chosen[count]:
        count += 1
    return count
