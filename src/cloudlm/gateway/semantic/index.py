"""Vectors of questions that have an answer, to be found by likeness within one group.

A group holds what may answer for each other at all: one tenant, one version, one conversation so
far, one set of parameters. Bounded; tenants share the room (``Holdings``). Must not decide whether
two questions mean the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cloudlm.gateway.holdings import Holdings, Place
from cloudlm.gateway.semantic.meaning import Meaning

MAX_GROUP = 2048
"""Questions in one group: the search through them is a fraction of a millisecond."""
TURN_BYTES = 4096
"""What a question costs besides its vector."""
_FIRST_ROWS = 8


class Near(NamedTuple):
    """A question that is like another one, and where its answer is."""

    place: Place
    meaning: Meaning
    likeness: float


class _Known(NamedTuple):
    group: bytes
    meaning: Meaning


@dataclass(slots=True)
class _Group:
    """Vectors in the rows of a matrix; what stands in each row."""

    rows: Any
    places: list[Place]

    def add(self, place: Place, vector: Any) -> None:
        count = len(self.places)
        if count == len(self.rows):
            self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
        self.rows[count] = vector
        self.places.append(place)

    def remove(self, place: Place) -> None:
        """The last row takes the place of the one that goes."""
        row = self.places.index(place)
        last = self.places.pop()
        if last != place:
            self.rows[row] = self.rows[len(self.places)]
            self.places[row] = last


class Index:
    """See the module."""

    def __init__(self, max_bytes: int, ttl_s: float, weights: Mapping[str, float]) -> None:
        self._ttl_s = ttl_s
        self._known: Holdings[_Known] = Holdings(max_bytes, weights, self._gone)
        self._groups: dict[bytes, _Group] = {}

    @property
    def size_bytes(self) -> int:
        """What is held."""
        return self._known.size_bytes

    def add(self, group: bytes, place: Place, vector: Any, meaning: Meaning, now: float) -> None:
        """The question with this unit vector has its answer at ``place``."""
        self._known.drop(place)
        found = self._groups.get(group)
        if found is not None and len(found.places) >= MAX_GROUP:
            self._known.drop(found.places[0])
        known, size_bytes = _Known(group, meaning), vector.nbytes + TURN_BYTES
        rows = self._groups.get(group)
        if rows is None:
            empty = np.zeros((_FIRST_ROWS, vector.size), np.float32)
            rows = self._groups[group] = _Group(empty, [])
        rows.add(place, vector)
        self._known.put(place, known, size_bytes, now + self._ttl_s, now)

    def near(self, group: bytes, vector: Any, threshold: float, now: float) -> Iterator[Near]:
        """Questions of a group that are at least so like ``vector``, the most alike first."""
        found = self._groups.get(group)
        if found is None or found.rows.shape[1] != vector.size:
            return
        likeness = found.rows[: len(found.places)] @ vector
        rows = np.flatnonzero(likeness >= threshold)
        order = rows[np.argsort(-likeness[rows], kind="stable")]
        for place, value in [(found.places[row], float(likeness[row])) for row in order]:
            known = self._known.get(place, now)
            if known is not None:
                yield Near(place, known.meaning, value)

    def drop(self, place: Place) -> None:
        """The answer at ``place`` is gone."""
        self._known.drop(place)

    def _gone(self, place: Place, known: _Known) -> None:
        group = self._groups[known.group]
        group.remove(place)
        if not group.places:
            del self._groups[known.group]
