"""Reads the versions that a scenario deploys: when, and what they are really like.

Must not say how they take over: the deployment's ``rollout`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import Fields
from cloudlm.sim.figures import Figures
from cloudlm.sim.versions import Release, Version

MAX_ROLLOUTS = 50


def read_rollouts(
    entries: Sequence[Any], usual: dict[str, Any], figures: Callable[[dict[str, Any]], Figures]
) -> tuple[Release, ...]:
    """The versions in order of time. What an entry's ``replica`` leaves out is as in ``usual``, the
    scenario's own; ``figures`` reads it. Raises InvalidRequest naming the field."""
    if len(entries) > MAX_ROLLOUTS:
        raise InvalidRequest(
            f"rollouts may be {MAX_ROLLOUTS} at most, not {len(entries)}", param="rollouts"
        )
    found = [_release(one, number, usual, figures) for number, one in enumerate(entries, 2)]
    models = [one.version.model for one in found]
    for model in models:
        if models.count(model) > 1:
            raise InvalidRequest(
                f"rollouts.model {model!r} is named twice; each roll-out brings a version of its "
                "own",
                param="rollouts.model",
            )
    return tuple(sorted(found, key=lambda one: one.at))


def _release(
    body: Any,
    number: int,
    usual: dict[str, Any],
    figures: Callable[[dict[str, Any]], Figures],
) -> Release:
    given = Fields(body, "a roll-out", path="rollouts.")
    at = given.number("at", low=0.0)
    name = given.text("name", f"version {number}", low=1, max_length=64)
    version = Version(
        given.text("model", f"models:/simulated/{number}", low=1, max_length=256),
        figures({**usual, **given.mapping("replica", {})}),
        error_rate=given.number("error_rate", 0.0, low=0.0, high=1.0),
        score=given.number("score", 1.0, low=0.0, high=1.0),
        scored=given.number("scored", 0.0, low=0.0, high=1.0),
        starts=given.flag("starts", True),
    )
    given.end()
    return Release(at, name, version)
