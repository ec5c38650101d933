"""How a new revision takes over: what its roll-out does next, a pure function.

What must be remembered comes in and goes out as ``core.rollout.Rollout``; the caller keeps it
before it acts on it, so that a control which is killed anywhere goes on where it was. Facts come
fresh with each call, and nothing happens because of an event: whatever was missed or repeated, the
next call decides the same. Must not know drivers, stores, addresses or a clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cloudlm.control.signals import NOTHING_KNOWN, Signals, breach, lacking
from cloudlm.core.deployment import Deployment
from cloudlm.core.rollout import Kind, Order, Outcome, Rollout, Stage, Strategy, stages_of

NOTED_EVERY = 0.1
"""The part of the time to start after which it is noted that it has not begun."""
_NO_REQUESTS = Stage(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known at this moment, by revision.

    ``wanted`` replicas shall answer. ``present`` counts the replicas that exist, of every group
    that does, and ``ready`` those that answer or sleep. ``outcomes`` is the history. ``new`` and
    ``old`` are the signals of the target since its stage began and of the stable revision.
    ``failing`` says why replicas of the target do not come up, empty if nothing hinders them.
    ``endpoints`` are those of others that the target consists of (0: of replicas of ours): all are
    there at once, whatever is wanted. ``dead`` of them fail, as they do in the stable revision.
    ``no_room``: the memory has none for all of these replicas; ``never`` says why it will not have
    any, whatever others do, empty if it may.
    """

    wanted: int
    present: Mapping[int, int] = field(default_factory=dict)
    ready: Mapping[int, int] = field(default_factory=dict)
    outcomes: Mapping[int, Outcome] = field(default_factory=dict)
    new: Signals = NOTHING_KNOWN
    old: Signals = NOTHING_KNOWN
    failing: str = ""
    endpoints: int = 0
    dead: int = 0
    no_room: bool = False
    never: str = ""

    def needed(self, size: int) -> int:
        """How many of the target's replicas must be ready where it is to have ``size``."""
        return max(self.endpoints - self.dead, 1) if self.endpoints else size


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do. ``rollout`` is to be kept first.

    ``size`` replicas of the target run beside the stable revision; None: the target replaces all
    others, as ``plan`` does it. ``hold``: nothing but what is broken changes. ``shares`` is the
    part of the requests that each revision gets (those that are not named: all alike), ``mirrors``
    the part that each gets copies of. ``ended`` are revisions whose fate is decided. ``back`` is
    why to return to the stable revision, empty if not to. ``note`` says to people where it stands,
    and ``waits`` what for: that changes all the time.
    """

    rollout: Rollout
    size: int | None = None
    hold: bool = False
    shares: Mapping[int, float] = field(default_factory=dict)
    mirrors: Mapping[int, float] = field(default_factory=dict)
    ended: tuple[tuple[int, Outcome, str], ...] = ()
    back: str = ""
    note: str = ""
    waits: str = ""


def decide(deployment: Deployment, before: Rollout | None, facts: Facts, now: float) -> Decision:
    """The next step of a deployment's roll-out; ``before`` is what was kept last (None: nothing),
    ``now`` Unix seconds."""
    strategy = deployment.spec.rollout
    rollout = aligned(deployment, before, facts.outcomes, now)
    if rollout.began_at > now:  # noted while the clock was ahead: it could not be late until then
        rollout = replace(rollout, began_at=now)
    if before is not None and rollout.since != before.since:
        facts = replace(facts, new=NOTHING_KNOWN)  # it was seen in a stage that is no more
    if not rollout.under_way:
        shares = _without(rollout.rejected, facts)
        decision = Decision(rollout, shares=shares, note=rollout.reason)
    elif rollout.order is Order.ABORT and rollout.stable:
        decision = _back(strategy, rollout, "aborted", facts)
    elif rollout.paused_at:
        decision = _paused(strategy, rollout, facts)
    elif is_staged(strategy, rollout):
        decision = _staged(strategy, rollout, facts, now)
    elif facts.never and rollout.stable and not facts.present.get(rollout.target):
        decision = _kept_out(strategy, rollout, facts, now)
    else:
        if facts.no_room and not facts.present.get(rollout.target):
            rollout = _not_begun(strategy, rollout, now)
        decision = _rolling(rollout, facts)
    return replace(decision, ended=(*decision.ended, *_superseded(rollout, facts)))


def aligned(
    deployment: Deployment,
    before: Rollout | None,
    outcomes: Mapping[int, Outcome],
    now: float,
) -> Rollout:
    """The roll-out towards the revision that is asked for now, by the strategy that is: ``before``,
    where that stands in a changed strategy, or a new one."""
    name, wanted = deployment.spec.name, deployment.revision
    before = before or Rollout(name)
    if before.target == wanted:
        return _followed(deployment.spec.rollout, before, now)
    # Staged, the stable revision is whole beside it: what is given up can be cut off at once.
    known = before.stages or stages_of(deployment.spec.rollout)
    staged = before.under_way and not before.plain and before.stage < len(known)
    rejected = before.target if staged else before.rejected
    if wanted == before.stable:
        return Rollout(name, wanted, wanted, rejected if staged else 0, reason=before.reason)
    good = outcomes.get(wanted) is Outcome.PROMOTED
    plain = good or not before.stable or deployment.spec.rollout.kind is Kind.ROLLING
    return Rollout(
        name,
        before.stable,
        wanted,
        rejected if rejected != wanted else 0,
        began_at=now,
        plain=plain,
        stages=() if plain else stages_of(deployment.spec.rollout),
    )


def _followed(strategy: Strategy, rollout: Rollout, now: float) -> Rollout:
    """The roll-out by a strategy that may have changed since. What goes on replica by replica does
    so, for its stable revision is whole no more. A staged one goes on at the first stage that sends
    it no less than it gets now, or at the last one, and is measured there anew; without stages it
    goes on replica by replica. Other times alone leave it where it is."""
    wanted, known = stages_of(strategy), rollout.stages
    if rollout.plain or not rollout.under_way or wanted == known:
        return rollout
    if not known:  # kept by a control that noted none
        return replace(rollout, stages=wanted)
    if not wanted:
        return replace(
            rollout, plain=True, stages=(), began_at=now, since=0.0, order=_outright(rollout.order)
        )
    if [one[:3] for one in wanted] == [one[:3] for one in known]:
        return replace(rollout, stages=wanted)
    gets = _sent(known, rollout)
    stage = next((n for n, one in enumerate(wanted) if one.share >= gets), len(wanted) - 1)
    return replace(rollout, stages=wanted, stage=stage, began_at=now, since=0.0)


def _outright(order: Order) -> Order:
    """What is left of an order where no stages are."""
    return order if order is Order.ABORT else Order.NONE


def _sent(stages: Sequence[Stage], rollout: Rollout) -> float:
    """The part of the requests that the target gets: while a stage waits for its replicas, that of
    the one before."""
    number = rollout.stage if rollout.since else rollout.stage - 1
    return stages[min(number, len(stages) - 1)].share if number >= 0 else 0.0


def is_staged(strategy: Strategy, rollout: Rollout) -> bool:
    """Whether the stable revision stays whole beside the target for now."""
    return not rollout.plain and rollout.stage < len(stages_of(strategy))


def size_of(stage: Stage, facts: Facts) -> int:
    """How many replicas of the target a stage has, of those wanted: one even of none, for nothing
    is known of a revision that was never started. Endpoints of others are all there: they cost
    nothing until they are asked, and one of them alone may be dead."""
    return facts.endpoints or math.ceil(max(facts.wanted, 1) * stage.size - 1e-9)


# The ways ---------------------------------------------------------------------------------------


def _rolling(rollout: Rollout, facts: Facts) -> Decision:
    target = rollout.target
    others = [revision for revision in facts.present if revision != target]
    ready, needed = facts.ready.get(target, 0), facts.needed(facts.wanted)
    if others or ready < needed or target not in facts.present:
        note = f"revision {target} starts"
        if others:
            how = "at once" if facts.endpoints else "replica by replica"
            note = f"revision {target} replaces what runs, {how}"
        waits = f"{ready} of {needed} replicas ready" if ready < needed else ""
        if others and not waits:
            waits = f"the end of revision {', '.join(map(str, sorted(others)))}"
        shares = _without(rollout.rejected, facts)
        return Decision(rollout, shares=shares, note=note, waits=waits)
    whole = Rollout(rollout.name, target, target)
    return Decision(whole, ended=((target, Outcome.PROMOTED, ""),))


def _kept_out(strategy: Strategy, rollout: Rollout, facts: Facts, now: float) -> Decision:
    """Nothing goes for a target that can never start, and the stable revision follows its load
    meanwhile; after the time that it has to, back."""
    if now - rollout.began_at >= strategy.start_timeout_s and strategy.auto_rollback:
        return _back(strategy, rollout, facts.never, facts)
    shares = _without(rollout.rejected, facts)
    return Decision(rollout, size=0, shares=shares, note=f"it cannot go on: {facts.never}")


def _staged(strategy: Strategy, rollout: Rollout, facts: Facts, now: float) -> Decision:
    stages = stages_of(strategy)
    stage = stages[rollout.stage]
    if rollout.order is Order.PROMOTE_FULLY:
        return _onward(strategy, rollout, len(stages), facts, now)
    if rollout.since > now:  # noted while the clock was ahead: it would last until then
        rollout = replace(rollout, since=now)
    size = facts.needed(size_of(stage, facts))
    ready = facts.ready.get(rollout.target, 0)
    if not rollout.since:
        if ready < size:
            return _starting(strategy, rollout, facts, now, f"{ready} of {size} replicas ready")
        rollout = replace(rollout, since=now)
    if rollout.order is Order.PROMOTE:
        return _onward(strategy, rollout, rollout.stage + 1, facts, now)
    broken = breach(strategy, facts.new, facts.old) or facts.failing
    if broken and strategy.auto_rollback:
        return _back(strategy, rollout, broken, facts)
    if broken:
        said = f"{broken}; 'promote' goes on all the same, 'abort' goes back"
        return _carried(strategy, rollout, stage, facts, said)
    left_s = stage.duration_s - (now - rollout.since)
    missing = [f"{math.ceil(left_s)} s more"] if left_s > 0 else []
    if stage.measured:
        missing += lacking(strategy, facts.new)
    if not ready:
        missing = [f"a replica of revision {rollout.target} that answers"]
    if missing:
        return _carried(strategy, rollout, stage, facts, waits=", ".join(missing))
    if stage.share < 1.0 and not strategy.auto_promote:
        return _carried(strategy, rollout, stage, facts, "it waits for 'promote' or 'abort'")
    return _onward(strategy, rollout, rollout.stage + 1, facts, now)


def _not_begun(strategy: Strategy, rollout: Rollout, now: float) -> Rollout:
    """The roll-out whose time to start does not run now; noted now and then, not at each look."""
    noted = now - rollout.began_at < max(strategy.start_timeout_s * NOTED_EVERY, 1.0)
    return rollout if noted else replace(rollout, began_at=now)


def _starting(
    strategy: Strategy, rollout: Rollout, facts: Facts, now: float, how_many: str
) -> Decision:
    """The stage has not all its replicas yet: requests go as in the one before. The time to start
    is not running while the memory has no room for them, unless it never will."""
    late = now - rollout.began_at >= strategy.start_timeout_s
    size = size_of(stages_of(strategy)[rollout.stage], facts)
    said = ""
    if facts.endpoints or facts.present.get(rollout.target, 0) >= size:
        pass  # they are there
    elif facts.never:
        said = f"it cannot go on: {facts.never}"
    elif facts.no_room:
        late, how_many = False, f"{how_many}, no room in memory for more"
        rollout = _not_begun(strategy, rollout, now)
    why = f": {facts.never}" if said else f" ({how_many})"
    broken = facts.failing or (
        f"not ready within {strategy.start_timeout_s:g} s{why}" if late else ""
    )
    if broken and strategy.auto_rollback:
        return _back(strategy, rollout, broken, facts)
    earlier = _before(strategy, rollout)
    return _carried(strategy, rollout, earlier, facts, broken or said, waits=how_many)


def _paused(strategy: Strategy, rollout: Rollout, facts: Facts) -> Decision:
    if not is_staged(strategy, rollout):
        shares = _without(rollout.rejected, facts)
        return Decision(rollout, hold=True, shares=shares, note="paused")
    stage = stages_of(strategy)[rollout.stage] if rollout.since else _before(strategy, rollout)
    return _carried(strategy, rollout, stage, facts, "paused")


def _before(strategy: Strategy, rollout: Rollout) -> Stage:
    """The stage before the present one."""
    return stages_of(strategy)[rollout.stage - 1] if rollout.stage else _NO_REQUESTS


def _onward(strategy: Strategy, rollout: Rollout, stage: int, facts: Facts, now: float) -> Decision:
    """The next stage, of which nothing is known yet, or the promotion."""
    onward = replace(rollout, stage=stage, began_at=now, since=0.0, order=Order.NONE)
    if not is_staged(strategy, onward):
        return _rolling(replace(onward, plain=True, stages=()), facts)
    return _staged(strategy, onward, replace(facts, new=NOTHING_KNOWN), now)


def _back(strategy: Strategy, rollout: Rollout, why: str, facts: Facts) -> Decision:
    """To the stable revision. Where that is whole, the target gets no further request."""
    shares = dict(_without(rollout.rejected, facts))
    if is_staged(strategy, rollout):
        shares |= _without(rollout.target, facts)
    reason = f"revision {rollout.target} was rolled back: {why}"
    kept = replace(rollout, reason=reason)
    return Decision(kept, hold=True, shares=shares, back=why, note=reason)


def _carried(
    strategy: Strategy,
    rollout: Rollout,
    stage: Stage,
    facts: Facts,
    said: str = "",
    waits: str = "",
) -> Decision:
    """Requests as ``stage`` has them, replicas of the target as the present one. While none of
    these answers, but the stable revision does, it takes over: that is what it was kept for."""
    stages, target = stages_of(strategy), rollout.target
    unheard = not facts.ready.get(target) and facts.ready.get(rollout.stable)
    share = 0.0 if unheard else stage.share
    shares = dict.fromkeys(facts.present, 1.0 - share)
    shares[target] = share
    if rollout.rejected:
        shares[rollout.rejected] = 0.0
    gets = f"{100 * share:g} % of the requests"
    if stage.mirror:
        gets = f"copies of {100 * stage.mirror:g} % of the requests"
    note = f"step {rollout.stage + 1} of {len(stages)}: revision {target} gets {gets}"
    return Decision(
        rollout,
        size_of(stages[rollout.stage], facts),
        shares=shares,
        mirrors={target: stage.mirror} if stage.mirror else {},
        note=f"{note}; {said}" if said else note,
        waits=waits,
    )


def _without(rejected: int, facts: Facts) -> Mapping[int, float]:
    """No request for a revision that was taken back, as long as it is there; all others alike."""
    return {rejected: 0.0} if rejected in facts.present else {}


def _superseded(rollout: Rollout, facts: Facts) -> list[tuple[int, Outcome, str]]:
    """Revisions that were never decided on, and are asked for no longer."""
    why = f"revision {rollout.target} took its place"
    return [
        (revision, Outcome.SUPERSEDED, why)
        for revision, outcome in facts.outcomes.items()
        if outcome is Outcome.PENDING and revision != rollout.target
    ]
