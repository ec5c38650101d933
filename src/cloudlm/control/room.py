"""What a deployment wants of the memory while it is rolled out, and what the memory leaves of its
plan: pure functions.

The budget's verdict counts replicas on this machine, of all revisions together. A plan is made to
keep to it: nothing starts that has no room, and what shall go goes, also where the roll-out stands
still. Groups that run elsewhere take no memory here; none of them is given up while the replicas
that are to take its place have no room. Must not know drivers or a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cloudlm.control.plan import Action, Apply, Plan, group_name, leaving_of, size_of_group
from cloudlm.control.residency import Claim, Verdict
from cloudlm.control.rollout import Facts, is_staged, size_of
from cloudlm.core.deployment import Demand, Deployment, GroupObservation, Residence
from cloudlm.core.rollout import Revision, Rollout, stages_of


@dataclass(frozen=True, slots=True)
class Moving:
    """What a roll-out wants to run. ``stable`` is its stable revision's number, ``revision`` all
    that is known of that (None: not read). ``size`` replicas of the target, or endpoints of others,
    are to be beside it; None: the target takes the place of all others."""

    stable: int = 0
    revision: Revision | None = None
    size: int | None = None


def beside(deployment: Deployment, rollout: Rollout, wanted: int) -> int | None:
    """How many replicas of the target are to run beside the stable revision, of which so many are
    ``wanted``. None: the target takes the place of all others."""
    strategy = deployment.spec.rollout
    if deployment.deleting or not rollout.under_way or not is_staged(strategy, rollout):
        return None
    facts = Facts(wanted, endpoints=len(deployment.spec.endpoints))
    return size_of(stages_of(strategy)[rollout.stage], facts)


@dataclass(frozen=True, slots=True)
class Wish:
    """What one deployment would have if memory were no matter. ``sized`` is it with the spec that
    bounds its replicas (``Releases.sized``), ``demand`` its fresh reports, ``version`` the fixed
    version of its newest revision (empty: not known yet)."""

    deployment: Deployment
    sized: Deployment
    wanted: int
    demand: Sequence[Demand] = ()
    version: str = ""
    moving: Moving = Moving()

    @property
    def name(self) -> str:
        return self.deployment.spec.name

    @property
    def target(self) -> str:
        """The group of its newest revision."""
        return group_name(self.name, self.deployment.revision)

    @property
    def stable(self) -> str:
        """The group of its stable revision."""
        return group_name(self.name, self.moving.stable)


def in_order_of_going(
    groups: Sequence[GroupObservation], stable: str, target: str
) -> list[GroupObservation]:
    """Whose replicas go first: what is neither the target nor the stable revision, then the target,
    at last what answers while that is tried. ``stable`` and ``target`` are names of groups."""
    return sorted(groups, key=lambda one: (one.name == stable, one.name == target, one.name))


@dataclass(frozen=True, slots=True)
class Room:
    """What one deployment may have. ``wished`` replicas would be there if memory were no matter.

    ``verdict`` and ``claim`` are those of this pass (None: no budget concerns it). ``groups`` are
    all of its groups, ``near`` the names of those that run on this machine or would, ``target`` and
    ``stable`` the names of those two groups. ``note`` is for people, empty if there is nothing to
    say, and ``problem`` what keeps it out of the memory for good. ``never`` is why what a roll-out
    wants to start can never be there.
    """

    wished: int
    verdict: Verdict | None = None
    claim: Claim | None = None
    groups: tuple[GroupObservation, ...] = ()
    near: frozenset[str] = frozenset()
    target: str = ""
    stable: str = ""
    note: str = ""
    problem: str = ""
    never: str = ""

    @property
    def wanted(self) -> int:
        """How many replicas to plan for: as many as there is room for, and beside other groups one
        at least, so that nothing takes their place which never answered. What runs elsewhere serves
        until all that are wished are here."""
        if self.verdict is None or self._far():
            return self.wished
        others = any(one.name != self.target for one in self.groups)
        return min(self.wished, max(self.verdict.replicas, int(others)))

    @property
    def granted(self) -> int:
        """How many of the replicas wished there may be."""
        return self.wished if self.verdict is None else min(self.wished, self.verdict.replicas)

    @property
    def shown(self) -> int:
        """How many replicas people are told are wanted."""
        return self.wished if self._is(Residence.WAITING) else self.granted

    @property
    def no_room(self) -> bool:
        """Whether there is none for all replicas that the roll-out wants."""
        verdict, claim = self.verdict, self.claim
        if verdict is None or claim is None or self.target not in self.near:
            return False
        return verdict.replicas < max(claim.wanted, 1)

    @property
    def patient(self) -> bool:
        """Whether replicas go to make room for others: they may take their time. Those of a
        deployment that wants none any more, as when it is deleted, go for their own sake."""
        if self.verdict is None or self.claim is None or not self.claim.wanted:
            return False
        return self.verdict.replicas < max(self.wished, self.claim.staying)

    def told(self, decided: str, scaled: str) -> str:
        """What people are told: what hinders the roll-out, else where that stands (``decided``),
        else that nothing is in memory, else how so many replicas are wanted (``scaled``)."""
        if self._is(Residence.UNLOADED):
            return decided or self.note or scaled
        return self.note or decided or scaled

    def fitted(self, deployment: Deployment) -> Deployment:
        """The deployment with no larger surge than there is room for: where that is none, the old
        replica goes before the new one comes, and requests wait meanwhile."""
        if self.verdict is None or self._far():
            return deployment
        surge = min(deployment.spec.max_surge, max(self.verdict.replicas - self.wanted, 0))
        return replace(deployment, spec=replace(deployment.spec, max_surge=surge))

    def fit(self, step: Plan) -> Plan:
        """The plan as far as there is room for it, and with what shall go for others."""
        if self.verdict is None:
            return step
        known = {group.name: group for group in self.groups}
        short = self.target in self.near and self.verdict.replicas < self.wished
        actions: list[Action] = []
        for action in self._shrunk(self._capped(step.actions)):
            name = _name(action)
            group = known.get(name)
            if name in self.near:
                if not (isinstance(action, Apply) and _changes_nothing(action, group)):
                    actions.append(action)
            elif not (short and name != self.target and _gives_up(action, group)):
                actions.append(action)
        return Plan(tuple(actions))

    def _capped(self, actions: Sequence[Action]) -> list[Action]:
        """Nothing starts for which there is no room beside all that is still there."""
        assert self.verdict is not None
        sizes = {one.name: size_of_group(one) for one in self.groups if one.name in self.near}
        capped: list[Action] = []
        for action in actions:
            name = _name(action)
            if isinstance(action, Apply) and name in self.near:
                size = sizes.get(name, 0)
                most = max(size, self.verdict.replicas - (sum(sizes.values()) - size))
                action = self._sized(action, min(action.spec.replicas, most))
                sizes[name] = max(size, action.spec.replicas)
            capped.append(action)
        return capped

    def _shrunk(self, actions: Sequence[Action]) -> list[Action]:
        """No more replicas stay than the verdict says, whatever the roll-out waits for."""
        assert self.verdict is not None
        near = [one for one in self.groups if one.name in self.near]
        after = {one.name: 0 if one.spec is None else one.spec.replicas for one in near}
        after |= {
            _name(one): one.spec.replicas if isinstance(one, Apply) else 0
            for one in actions
            if _name(one) in self.near
        }
        excess = sum(after.values()) - self.verdict.replicas
        new = [GroupObservation(name, None) for name in after if name not in {g.name for g in near}]
        found = list(actions)
        for group in in_order_of_going([*near, *new], self.stable, self.target):
            cut = min(after[group.name], max(excess, 0))
            excess -= cut
            if cut:
                found = self._cut(found, group, after[group.name] - cut)
        return found

    def _cut(self, actions: list[Action], group: GroupObservation, size: int) -> list[Action]:
        """The actions, with the group at this ``size``."""
        if any(_name(one) == group.name for one in actions):
            return [
                self._sized(one, size)
                if isinstance(one, Apply) and one.spec.name == group.name
                else one
                for one in actions
            ]
        assert group.spec is not None  # what no action makes is there
        return [*actions, self._sized(Apply(group.spec), size)]

    def _sized(self, action: Apply, replicas: int) -> Apply:
        """The action with so many replicas."""
        if action.spec.replicas == replicas:
            return action
        group = next((one for one in self.groups if one.name == action.spec.name), None)
        leaving = frozenset[str]() if group is None else leaving_of(group, replicas)
        return Apply(replace(action.spec, replicas=replicas), leaving)

    def _far(self) -> bool:
        """Whether any of it is elsewhere."""
        return any(one.name not in self.near and size_of_group(one) for one in self.groups)

    def _is(self, residence: Residence) -> bool:
        return self.verdict is not None and self.verdict.residence is residence


def _name(action: Action) -> str:
    return action.spec.name if isinstance(action, Apply) else action.name


def _changes_nothing(action: Apply, group: GroupObservation | None) -> bool:
    """Whether the group is as the action would make it."""
    if group is None or group.spec is None:
        return False
    return len(group.replicas) == group.spec.replicas == action.spec.replicas


def _gives_up(action: Action, group: GroupObservation | None) -> bool:
    """Whether the action takes replicas from the group."""
    if group is None or group.spec is None:
        return False
    return not isinstance(action, Apply) or action.spec.replicas < group.spec.replicas
