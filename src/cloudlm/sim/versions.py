"""What versions of a model are really like: how quick, how often wrong, how good, whether they
start. What control knows of them it must find out.

Must not decide anything about them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cloudlm.sim.figures import Figures


@dataclass(frozen=True, slots=True)
class Version:
    """A fixed version. ``error_rate`` is the share of attempts that its replicas answer with an
    error where their first token was due; ``score`` the mean of the scores, 0 or 1, that the share
    ``scored`` of its answers gets. One that does not ``start`` ends again and again."""

    model: str
    figures: Figures
    error_rate: float = 0.0
    score: float = 1.0
    scored: float = 0.0
    starts: bool = True


@dataclass(frozen=True, slots=True)
class Release:
    """A version is deployed ``at`` seconds, under a ``name`` for people."""

    at: float
    name: str
    version: Version


class Versions:
    """All versions of a simulation; one that nobody described has the usual figures."""

    def __init__(self, figures: Figures, releases: Iterable[Release] = ()) -> None:
        self._figures = figures
        self._known = {one.version.model: one.version for one in releases}

    def of(self, model: str) -> Version:
        """The version at a fixed address."""
        if model not in self._known:
            self._known[model] = Version(model, self._figures)
        return self._known[model]
