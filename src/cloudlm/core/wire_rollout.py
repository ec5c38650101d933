"""What roll-outs and revisions look like in the control API's JSON, both ways; see ``core.wire``.
No I/O."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import Fields
from cloudlm.core.rollout import Kind, Outcome, Revision
from cloudlm.core.wire import read_spec, spec_body

MAX_SCORES_AT_ONCE = 1_000_000


@dataclass(frozen=True, slots=True)
class SideView:
    """What is known of the answers of one revision. Times are 95th percentiles in seconds, and
    ``score`` is a mean from 0 to 1; None without any."""

    revision: int
    attempts: int = 0
    failed: int = 0
    ttft_s: float | None = None
    latency_s: float | None = None
    scores: int = 0
    score: float | None = None


@dataclass(frozen=True, slots=True)
class RolloutView:
    """Where a roll-out stands, for people. ``stable`` answers (0: nothing was ever whole),
    ``target`` is to; they are equal if nothing is under way. ``step`` counts from 1 to ``steps``
    (0: it goes without). ``percent`` of the requests go to the target, copies of
    ``mirror_percent`` of them. ``since`` is when that began, Unix seconds, 0: not yet."""

    name: str
    kind: Kind
    stable: int
    target: int
    paused: bool = False
    step: int = 0
    steps: int = 0
    percent: float = 0.0
    mirror_percent: float = 0.0
    since: float = 0.0
    note: str = ""
    waits: str = ""
    sides: tuple[SideView, ...] = ()

    @property
    def under_way(self) -> bool:
        """Whether one revision is replacing another."""
        return self.stable != self.target


def rollout_body(view: RolloutView) -> dict[str, Any]:
    body = asdict(view)
    return {**body, "kind": view.kind.value, "sides": [asdict(one) for one in view.sides]}


def rollout_from_body(body: Any) -> RolloutView:
    fields = Fields(body, "a roll-out")
    return RolloutView(
        name=fields.text("name"),
        kind=fields.choice("kind", Kind),
        stable=fields.integer("stable"),
        target=fields.integer("target"),
        paused=fields.flag("paused", False),
        step=fields.integer("step", 0),
        steps=fields.integer("steps", 0),
        percent=fields.number("percent", 0.0),
        mirror_percent=fields.number("mirror_percent", 0.0),
        since=fields.number("since", 0.0),
        note=fields.text("note", ""),
        waits=fields.text("waits", ""),
        sides=tuple(_side(entry) for entry in fields.items("sides", ())),
    )


def _side(body: Any) -> SideView:
    fields = Fields(body, "a side", path="sides.")
    return SideView(
        revision=fields.integer("revision"),
        attempts=fields.integer("attempts", 0),
        failed=fields.integer("failed", 0),
        ttft_s=fields.optional_number("ttft_s"),
        latency_s=fields.optional_number("latency_s"),
        scores=fields.integer("scores", 0),
        score=fields.optional_number("score"),
    )


def revision_body(revision: Revision) -> dict[str, Any]:
    return {
        "revision": revision.number,
        "spec": spec_body(revision.spec),
        "created_at": revision.created_at,
        "by": revision.by,
        "outcome": revision.outcome.value,
        "reason": revision.reason,
        "ended_at": revision.ended_at,
        "model": revision.model,
        "adapters": dict(revision.adapters),
        "scores": revision.scores,
        "score_total": revision.score_total,
    }


def revision_from_body(body: Any) -> Revision:
    fields = Fields(body, "a revision")
    return Revision(
        number=fields.integer("revision", low=1),
        spec=read_spec(fields.raw("spec")),
        created_at=fields.number("created_at", 0.0),
        by=fields.text("by", ""),
        outcome=fields.choice("outcome", Outcome),
        reason=fields.text("reason", ""),
        ended_at=fields.number("ended_at", 0.0),
        model=fields.text("model", ""),
        adapters=fields.mapping("adapters", {}),
        scores=fields.integer("scores", 0),
        score_total=fields.number("score_total", 0.0),
    )


def undo_from_body(body: Any) -> int | None:
    """Read ``{"revision"?: 3}``: where to go back to, None is the good one before."""
    fields = Fields(body, "an undo")
    found = None if fields.raw("revision", None) is None else fields.integer("revision", low=1)
    fields.end()
    return found


def promotion_from_body(body: Any) -> bool:
    """Read ``{"fully"?: true}``: whether all steps that are left are passed over."""
    fields = Fields(body, "a promotion")
    fully = fields.flag("fully", False)
    fields.end()
    return fully


@dataclass(frozen=True, slots=True)
class Score:
    """How good answers were, 0 to 1: the mean of ``count``. They came from ``revision``, or from
    the one that answered ``request_id``."""

    score: float
    count: int = 1
    revision: int | None = None
    request_id: str | None = None


def score_body(score: Score) -> dict[str, Any]:
    body = {"score": score.score, "count": score.count}
    if score.revision is not None:
        body["revision"] = score.revision
    return body if score.request_id is None else {**body, "request_id": score.request_id}


def score_from_body(body: Any) -> Score:
    """Read a score. Raises InvalidRequest unless it says whose it is in one way."""
    fields = Fields(body, "a score")
    given = fields.raw("revision", None)
    found = Score(
        score=fields.number("score", low=0.0, high=1.0),
        count=fields.integer("count", 1, low=1, high=MAX_SCORES_AT_ONCE),
        revision=None if given is None else fields.integer("revision", low=1),
        request_id=fields.optional_text("request_id", max_length=64),
    )
    fields.end()
    if (found.revision is None) == (found.request_id is None):
        raise InvalidRequest(
            "a score needs 'revision', or 'request_id' (the answer's x-request-id), and not both",
            param="revision",
        )
    return found
