"""What must change so that the groups of a deployment become what was asked: a pure function.

A changed deployment is rolled out as Kubernetes does it: the new revision's group grows while old
groups shrink, with at most ``max_surge`` replicas more than wanted at any moment, and without
giving up a replica that answers before another one does (with ``max_surge`` 0, one less than
wanted is accepted). Where fewer are wanted than run, one that answers stays until so many others
do. What takes nothing holds up nothing: an old replica that ends again and again leaves its place
to a new one, and endpoints of others take none at all. The plan looks one step ahead: apply it,
observe again, plan again. Must not know drivers, addresses or time.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from cloudlm.core.deployment import Deployment, GroupObservation, GroupSpec, ReplicaState
from cloudlm.core.health import is_hopeless


@dataclass(frozen=True, slots=True)
class Apply:
    """Give the group this spec. ``leaving`` are the replicas that it stops."""

    spec: GroupSpec
    leaving: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Delete:
    """Stop and forget the group. ``leaving`` are its replicas."""

    name: str
    leaving: frozenset[str] = frozenset()


Action = Apply | Delete


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions in order; those with replicas leaving wait until these have been drained."""

    actions: tuple[Action, ...] = ()

    @property
    def leaving(self) -> frozenset[str]:
        """Ids of all replicas that are to stop."""
        return frozenset[str]().union(*(action.leaving for action in self.actions))


def group_name(deployment: str, revision: int) -> str:
    """The name of the group that runs one revision."""
    return f"{deployment}-r{revision}"


def revision_of(deployment: str, replica: str) -> int | None:
    """The revision that a replica runs, None if it is none of this deployment's
    (``drivers.groups.replica_ids``)."""
    found = re.fullmatch(re.escape(deployment) + r"-r([0-9]{1,15})-[0-9]+", replica)
    return int(found[1]) if found is not None else None


def desired_group(
    deployment: Deployment,
    model: str,
    replicas: int,
    adapters: Mapping[str, str] | None = None,
) -> GroupSpec:
    """The group of the deployment's revision. ``model`` and ``adapters`` are the fixed versions
    that it runs."""
    spec = deployment.spec
    return GroupSpec(
        name=group_name(spec.name, deployment.revision),
        deployment=spec.name,
        revision=deployment.revision,
        model=model,
        replicas=replicas,
        engine=spec.engine,
        options=dict(spec.options),
        env=dict(spec.env),
        adapters=dict(adapters or {}),
        endpoints=spec.endpoints,
    )


def plan_deletion(groups: Sequence[GroupObservation]) -> Plan:
    """Stop everything: the deployment is being deleted, or no longer exists."""
    return Plan(tuple(_delete(group) for group in groups if group.spec is not None))


def plan(
    deployment: Deployment,
    wanted: int,
    groups: Sequence[GroupObservation],
    ready: Collection[str],
    model: str,
    adapters: Mapping[str, str] | None = None,
) -> Plan:
    """The next step towards ``wanted`` replicas of the deployment's revision.

    ``groups`` are all groups of this deployment, ``ready`` the ids of replicas that answer (those
    that are being drained included, as long as they could answer again), ``model`` and
    ``adapters`` the fixed versions of the revision.
    """
    if deployment.deleting:
        return plan_deletion(groups)
    target = desired_group(deployment, model, wanted, adapters)
    existing = [group for group in groups if group.spec is not None]
    current = next((group for group in existing if group.name == target.name), None)
    old = sorted((g for g in existing if g.name != target.name), key=_revision)
    if current is not None and not _runs_same(current, target):
        # A leftover of an earlier deployment of this name: out of the way first.
        return Plan((_delete(current),))
    if target.endpoints:
        return _plan_external(target, current, old, ready)
    staying = _staying(current, wanted, ready)
    target = replace(target, replicas=staying)
    foreign = [group for group in old if _is_foreign(group)]
    own = [group for group in old if not _is_foreign(group)]
    taken = sum(_size(group, ready) for group in own)
    actions: list[Action] = []
    grown = _grow(target, current, wanted + deployment.spec.max_surge - taken)
    if grown is not None:
        actions.append(grown)
    floor = wanted - (1 if deployment.spec.max_surge == 0 else 0)
    actions += _shrink(own, current, staying, ready, floor)
    if _answering((*own, *([] if current is None else [current])), ready) >= wanted:
        actions += [_delete(group) for group in foreign]
    return Plan(tuple(actions))


def _plan_external(
    target: GroupSpec,
    current: GroupObservation | None,
    old: Sequence[GroupObservation],
    ready: Collection[str],
) -> Plan:
    """Nothing is started, so all endpoints are there at once. Old groups go whole as soon as one
    endpoint answers, and each was looked at or as many answer as did before."""
    whole = replace(target, replicas=len(target.endpoints))
    actions: list[Action] = []
    if current is None or current.spec != whole or len(current.replicas) < whole.replicas:
        actions.append(Apply(whole))
    seen = () if current is None else current.replicas[: whole.replicas]
    answering = sum(one.id in ready for one in seen)
    before = sum(one.id in ready for group in old for one in group.replicas)
    known = len(seen) == whole.replicas and all(
        one.id in ready or one.state is not ReplicaState.STARTING for one in seen
    )
    if answering and (known or answering >= before):
        actions += [_delete(group) for group in old]
    return Plan(tuple(actions))


def plan_target(
    target: GroupSpec, groups: Sequence[GroupObservation], ready: Collection[str]
) -> Plan:
    """The step that gives ``target`` its replicas, whatever else runs. ``ready`` as in ``plan``."""
    current = next((one for one in groups if one.name == target.name and one.spec), None)
    if current is None and not target.replicas:
        return Plan()  # a group of none would be there for nothing
    if current is not None and not _runs_same(current, target):
        return Plan((_delete(current),))
    target = replace(target, replicas=_staying(current, target.replicas, ready))
    size = 0 if current is None or current.spec is None else current.spec.replicas
    if current is not None and size == target.replicas <= len(current.replicas):
        return Plan()
    leaving = frozenset[str]() if current is None else leaving_of(current, target.replicas)
    return Plan((Apply(target, leaving),))


def plan_hold(groups: Sequence[GroupObservation], wanted: int = 0, serving: str = "") -> Plan:
    """Nothing but what is broken changes: groups that lost a replica get it back. Where none has
    any, while some are ``wanted``, the group ``serving`` gets them (the first, if it is not there):
    it went to zero, or was unloaded, and would never come back."""
    specs = [group.spec for group in groups if group.spec]
    if wanted and specs and not any(spec.replicas for spec in specs):
        spec = next((one for one in specs if one.name == serving), specs[0])
        return Plan((Apply(replace(spec, replicas=wanted)),))
    broken = [g.spec for g in groups if g.spec and len(g.replicas) < g.spec.replicas]
    return Plan(tuple(Apply(spec) for spec in broken))


def _staying(current: GroupObservation | None, wanted: int, ready: Collection[str]) -> int:
    """How many replicas the current group keeps, or gets: as many as wanted, and so many more that
    ``wanted`` answer, or all that do. Groups shrink from their end, and those at the beginning may
    be the ones that do not answer."""
    if current is None or current.spec is None:
        return wanted
    answers = [f"{current.name}-{number}" in ready for number in range(current.spec.replicas)]
    enough = min(wanted, sum(answers))
    return next(n for n in range(wanted, wanted + len(answers) + 1) if sum(answers[:n]) >= enough)


def _grow(
    target: GroupSpec,
    current: GroupObservation | None,
    room: int,
) -> Apply | None:
    """The current group's next size: that of ``target``, as far as there is ``room``."""
    if current is None or current.spec is None:
        return Apply(replace(target, replicas=max(0, min(target.replicas, room))))
    size = current.spec.replicas
    replicas = min(target.replicas, max(size, room))
    complete = len(current.replicas) >= replicas
    if replicas == size and complete:
        return None
    return Apply(replace(target, replicas=replicas), leaving_of(current, replicas))


def _shrink(
    old: Sequence[GroupObservation],
    current: GroupObservation | None,
    staying: int,
    ready: Collection[str],
    floor: int,
) -> list[Action]:
    """Take replicas from old groups, oldest revision first and newest replica first.

    One that answers may go as long as ``floor`` others answer; one that does not, as long as
    ``floor`` others exist without counting new ones that do not answer yet: so a moment in which
    nothing answers gives up nothing, and a broken revision makes room for its repair.
    ``staying`` replicas of the current group are not leaving.
    """
    kept = [] if current is None else [r.id for r in current.replicas][:staying]
    new_ready = sum(replica in ready for replica in kept)
    old_ready = sum(r.id in ready for group in old for r in group.replicas)
    spare_ready = new_ready + old_ready - floor
    spare_any = sum(group.spec.replicas for group in old if group.spec) + new_ready - floor
    actions: list[Action] = []
    for group in old:
        assert group.spec is not None
        size = group.spec.replicas
        while size > 0 and spare_any > 0:
            if f"{group.name}-{size - 1}" in ready:
                if spare_ready <= 0:
                    break
                spare_ready -= 1
            spare_any -= 1
            size -= 1
        if size == 0:
            actions.append(_delete(group))
        elif size < group.spec.replicas:
            actions.append(Apply(replace(group.spec, replicas=size), leaving_of(group, size)))
    return actions


def _runs_same(current: GroupObservation, target: GroupSpec) -> bool:
    assert current.spec is not None
    kept = current.spec
    same_names = kept.adapters.keys() == target.adapters.keys()
    fixed = replace(target, replicas=kept.replicas, model=kept.model, adapters=kept.adapters)
    return same_names and fixed == kept


def size_of_group(group: GroupObservation) -> int:
    """Replicas that take room: those asked for, and those still on their way out."""
    return max(0 if group.spec is None else group.spec.replicas, len(group.replicas))


def _is_foreign(group: GroupObservation) -> bool:
    """Whether its replicas are endpoints of others, of which nothing was started."""
    return group.spec is not None and bool(group.spec.endpoints)


def _answering(groups: Sequence[GroupObservation], ready: Collection[str]) -> int:
    return sum(one.id in ready for group in groups for one in group.replicas)


def _size(group: GroupObservation, ready: Collection[str]) -> int:
    """Its size without those that are hopeless: groups shrink from their end, so that one at the
    beginning cannot go first."""
    dead = sum(one.id not in ready and is_hopeless(one) for one in group.replicas)
    return size_of_group(group) - dead


def leaving_of(group: GroupObservation, replicas: int) -> frozenset[str]:
    """Ids of those that go when the group is to have so many ``replicas``."""
    kept = {f"{group.name}-{number}" for number in range(replicas)}
    return frozenset(replica.id for replica in group.replicas if replica.id not in kept)


def _delete(group: GroupObservation) -> Delete:
    return Delete(group.name, frozenset(replica.id for replica in group.replicas))


def _revision(group: GroupObservation) -> int:
    return 0 if group.spec is None else group.spec.revision
