"""What the control API can be asked of roll-outs, as data; see ``calls``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cloudlm.client.calls import Call, Program, all_of, path_of, until
from cloudlm.core.rollout import Revision
from cloudlm.core.wire_rollout import (
    RolloutView,
    Score,
    revision_from_body,
    rollout_from_body,
    score_body,
)


def get_rollout(name: str) -> Call[RolloutView]:
    return Call("GET", path_of("deployments", name, "rollout"), rollout_from_body)


def move_rollout(name: str, verb: str, body: Mapping[str, Any] | None = None) -> Call[RolloutView]:
    """``verb`` is pause, resume, promote, abort or undo."""
    path = path_of("deployments", name, "rollout", verb)
    return Call("POST", path, rollout_from_body, body)


def list_revisions(name: str) -> Call[list[Revision]]:
    return Call("GET", path_of("deployments", name, "revisions"), all_of(revision_from_body))


def add_score(name: str, score: Score) -> Call[Revision]:
    path = path_of("deployments", name, "score")
    return Call("POST", path, revision_from_body, score_body(score))


def wait_rolled_out(
    name: str, timeout_s: float, on_look: Callable[[RolloutView], None] | None
) -> Program[RolloutView]:
    """Ask until no roll-out is under way. Raises UpstreamTimeout if it takes too long."""

    def done(view: RolloutView) -> bool:
        if on_look is not None:
            on_look(view)
        return not view.under_way

    def late(view: RolloutView) -> str:
        waits = f" ({view.waits})" if view.waits else ""
        return f"the roll-out of {name!r} is not over after {timeout_s:g} s: {view.note}{waits}"

    return (yield from until(get_rollout(name), done, timeout_s, late))
