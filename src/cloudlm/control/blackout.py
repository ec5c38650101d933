"""When so much is missed at once that the looking is at fault sooner than what is looked at.

A driver that lists nothing all of a sudden, or a control whose own network is cut, would have
control take every endpoint away and replace a whole fleet that serves. So the loss of most of it
at once is believed only once it has lasted for ``BELIEVED_AFTER_S``; a loss that is true is acted
on that much later, and no more. It is Envoy's panic threshold (health is ignored where less than
50 % is healthy: envoyproxy.io, load balancing, panic threshold) turned to control, which unlike a
gateway can wait. What was told to stop is missed by nobody: it counts neither as known nor as lost.
Pure: gets facts and ``now``; must not ask drivers or replicas.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cloudlm.control.probe import ProbeRecord, Verdict
from cloudlm.core.deployment import GroupObservation, ReplicaState
from cloudlm.drivers.groups import replica_ids

BELIEVED_AFTER_S = 10.0
"""How long the loss of most of a fleet must last to be taken for true, seconds."""
FEWEST_SILENT = 2
"""One replica that is silent is its own fault, also where there is no other."""
_SERVING = (Verdict.READY, Verdict.SLEEPING)


@dataclass(frozen=True, slots=True)
class Doubt:
    """Whether what is missed may be there. ``since``: when the loss began (monotonic seconds; None:
    nothing to speak of is missed)."""

    since: float | None = None

    def next(self, known: int, lost: int, now: float, fewest: int = 1) -> Doubt:
        """After one more look, which missed ``lost`` of ``known``; fewer than ``fewest`` are no
        matter of doubt."""
        if lost < fewest or 2 * lost <= known:
            return Doubt()
        return self if self.since is not None else Doubt(now)

    def holds(self, now: float) -> bool:
        """Whether the loss is not believed yet."""
        return self.since is not None and now - self.since < BELIEVED_AFTER_S


def staying(group: GroupObservation) -> frozenset[str]:
    """The replicas that were found of a group and are meant to stay: it is asked for them, and they
    do not stop."""
    wanted = () if group.spec is None else replica_ids(group.spec)
    here = (one.id for one in group.replicas if one.state is not ReplicaState.DRAINING)
    return frozenset(here).intersection(wanted)


def missed(known: Collection[str], listed: Collection[str]) -> list[str]:
    """Of the replicas that a driver ran a moment ago, and nobody ended, those it lists no more."""
    return sorted(set(known) - set(listed))


def silent_at_once(
    doubt: Doubt,
    before: Mapping[str, Verdict | None],
    after: Mapping[str, ProbeRecord],
    now: float,
) -> tuple[Doubt, dict[str, Verdict]]:
    """What to make of the silence of those that stay: the next doubt, and those that are silent but
    serve on as they did, because most are silent with them. ``before`` is what each counted as
    until now, ``after`` what was found of those that were looked at more closely."""
    served = {one: was for one, was in before.items() if was in _SERVING}
    lost = {
        one: was
        for one, was in served.items()
        if was is not None and one in after and _is_silenced(was, after[one])
    }
    doubt = doubt.next(len(served), len(lost), now, FEWEST_SILENT)
    if doubt.holds(now):
        return doubt, lost
    return Doubt(), {}  # what was believed is over: the next loss is another one


def _is_silenced(before: Verdict, after: ProbeRecord) -> bool:
    """Whether a replica that answered, or slept, counts no more for its silence alone."""
    return after.misses > 0 and after.verdict is not before


def told(driver: str, known: int, lost: Sequence[str]) -> str:
    """What people read while a driver's list is doubted."""
    named = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
    return (
        f"driver {driver!r} lists {known - len(lost)} of the {known} replicas that it ran a moment "
        f"ago (missing: {named}); believed after {BELIEVED_AFTER_S:g} s, nothing is changed so long"
    )
