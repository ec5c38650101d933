"""Roll-outs in a simulation: deploys new versions when the scenario says so, and watches what
becomes of each.

How a version takes over is control's affair (``control.rollout``), by the strategy that the
deployment names. Must not influence it: what is counted here is for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cloudlm.control.plan import group_name
from cloudlm.core.rollout import Outcome
from cloudlm.sim.fleet import Fleet
from cloudlm.sim.revisions import Tally
from cloudlm.sim.state import SimState
from cloudlm.sim.timeline import Timeline, WallClock
from cloudlm.sim.versions import Release

WATCH_S = 1.0
TRY_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Seen:
    """A roll-out at one moment: the replicas of the new revision that answer, those of all others,
    and the share of the attempts since the last moment that went to the new one."""

    at: float
    new: int
    others: int
    share: float


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """What became of a version that was deployed.

    It was asked for at ``began_at``; its fate was decided at ``decided_at`` and no other revision
    was left at ``over_at`` (seconds; None: not until the end). ``attempts`` and ``failed`` are
    clients' attempts at its replicas, ``copies`` a mirror's. ``unanswered`` are the requests that
    were not answered, for whatever reason, while it went on. ``extra_replica_hours`` and
    ``extra_cost`` are those of the replicas beyond the number wanted: what the surge costs.
    """

    name: str
    revision: int
    outcome: Outcome
    reason: str
    began_at: float
    decided_at: float | None
    over_at: float | None
    attempts: int
    failed: int
    copies: int
    score: float | None
    unanswered: int
    extra_replica_hours: float
    extra_cost: float
    seen: tuple[Seen, ...] = ()


@dataclass(slots=True)
class _Course:
    """A roll-out under way."""

    name: str
    revision: int
    began_at: float
    unanswered_before: int
    over_at: float | None = None
    unanswered: int = 0
    extra_s: float = 0.0
    extra_cost: float = 0.0
    before: tuple[int, int] = (0, 0)
    seen: list[Seen] = field(default_factory=list)


class Rollouts:
    """All roll-outs of one simulation. ``clock`` is that of who deploys, ``wanted`` tells how many
    replicas shall answer, ``unanswered`` how many requests were not answered until now."""

    def __init__(
        self,
        releases: Sequence[Release],
        timeline: Timeline,
        clock: WallClock,
        state: SimState,
        fleet: Fleet,
        wanted: Callable[[], int],
        unanswered: Callable[[], int],
    ) -> None:
        self._timeline = timeline
        self._clock = clock
        self._state = state
        self._fleet = fleet
        self._wanted = wanted
        self._unanswered = unanswered
        self._courses: list[_Course] = []
        state.keeps_ledger = bool(releases)
        for release in releases:
            timeline.at(release.at, self._deploy, release)
        if releases:
            timeline.at(min(one.at for one in releases), self._watch)

    def _deploy(self, release: Release) -> None:
        """As ``cloudlm deploy`` would; while the state is down its user tries again."""
        if self._state.down:
            self._timeline.after(TRY_AGAIN_S, self._deploy, release)
            return
        revisions = self._state.revisions
        before = revisions.deployment
        asked = replace(before.spec, model=release.version.model)
        after = revisions.deploy(asked, self._clock.now())
        if after.revision != before.revision:
            self._end_last()
            now, unanswered = self._timeline.now, self._unanswered()
            every = sum(one.attempts for one in revisions.tallies.values())
            course = _Course(release.name, after.revision, now, unanswered, before=(0, every))
            self._courses.append(course)

    def _watch(self) -> None:
        """Count what is there beyond what is wanted until only one revision is left."""
        course = self._courses[-1] if self._courses else None
        if course is not None and course.over_at is None:
            self._look(course)
        self._timeline.after(WATCH_S, self._watch)

    def _look(self, course: _Course) -> None:
        new = others = rented = 0
        per_hour = 0.0
        group = group_name(self._state.revisions.deployment.spec.name, course.revision)
        for unit in self._fleet.units.values():
            if unit.zone is not None:
                rented += 1
                per_hour += unit.zone.price_per_hour
            if unit.serving is not None:
                ours = unit.id.rpartition("-")[0] == group
                new, others = new + ours, others + (not ours)
        beyond = max(0, rented - self._wanted())
        course.extra_s += beyond * WATCH_S
        course.extra_cost += beyond * WATCH_S / 3600.0 * per_hour / max(rented, 1)
        self._note(course, group, new, others)
        if course.revision in self._state.revisions.decided_at and self._is_over():
            self._end_last()

    def _note(self, course: _Course, group: str, new: int, others: int) -> None:
        tallies = self._state.revisions.tallies
        ours = tallies.get(group, Tally()).attempts
        every = sum(one.attempts for one in tallies.values())
        more, of = ours - course.before[0], every - course.before[1]
        course.before = ours, every
        course.seen.append(Seen(self._timeline.now, new, others, more / of if of else 0.0))

    def _is_over(self) -> bool:
        return sum(bool(one.replicas) for one in self._fleet.observe()) <= 1

    def _end_last(self) -> None:
        if self._courses and self._courses[-1].over_at is None:
            course = self._courses[-1]
            course.over_at = self._timeline.now
            course.unanswered = self._unanswered() - course.unanswered_before

    def results(self) -> tuple[RolloutResult, ...]:
        """What became of all of them until now."""
        return tuple(self._result(one) for one in self._courses)

    def _result(self, course: _Course) -> RolloutResult:
        revisions = self._state.revisions
        noted = revisions.revision(course.revision)
        name = revisions.deployment.spec.name
        tally = revisions.tallies.get(group_name(name, course.revision), Tally())
        unanswered = course.unanswered
        if course.over_at is None:
            unanswered = self._unanswered() - course.unanswered_before
        score = noted.score_total / noted.scores if noted is not None and noted.scores else None
        return RolloutResult(
            course.name,
            course.revision,
            Outcome.SUPERSEDED if noted is None else noted.outcome,
            "" if noted is None else noted.reason,
            course.began_at,
            revisions.decided_at.get(course.revision),
            course.over_at,
            tally.attempts,
            tally.failed,
            tally.copies,
            score,
            unanswered,
            course.extra_s / 3600.0,
            course.extra_cost,
            tuple(course.seen),
        )
