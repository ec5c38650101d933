"""Who is in this machine's memory: gathers the facts for ``residency``, remembers what it must, and
says what the verdicts mean for a deployment's plan and status.

Unloading stops the processes instead of putting them to sleep. A sleeping worker keeps its own
libraries' memory (260 MiB as measured), so that fifty of them would take 13 GiB, which no budget
could give to models; the price is a start instead of a waking (4.8 s instead of 0.1 s for a model
of a megabyte; docs/concepts/deployment.md). Must not start or stop anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from cloudlm.control.budget import MemoryBudget, fixed
from cloudlm.control.drivers import Drivers
from cloudlm.control.footprint import amount_text
from cloudlm.control.metrics import ControlMetrics
from cloudlm.control.observe import Seen, SeenGroup
from cloudlm.control.plan import Action, Apply, Plan, group_name, size_of_group
from cloudlm.control.residency import Claim, Verdict, held_by, reside
from cloudlm.core.clock import Clock
from cloudlm.core.deployment import Demand, Deployment, DeploymentStatus, Residence
from cloudlm.core.health import is_hopeless
from cloudlm.core.rollout import Kind

_NEVER = float("-inf")


@dataclass(slots=True)
class _Known:
    """What is remembered of a deployment, monotonic seconds."""

    used_at: float = _NEVER
    asked_at: float | None = None
    loaded_at: float | None = None


class Residents:
    """What is remembered of all deployments; all of it may be lost with the process."""

    def __init__(
        self, budget: MemoryBudget, drivers: Drivers, clock: Clock, metrics: ControlMetrics
    ) -> None:
        self._budget = budget
        self._drivers = drivers
        self._clock = clock
        self._metrics = metrics
        self._known: dict[str, _Known] = {}
        self._claims: dict[str, Claim] = {}
        self._verdicts: dict[str, Verdict] = {}
        self._models: dict[tuple[str, int], str] = {}

    async def look(
        self,
        deployments: Sequence[Deployment],
        wanted: Mapping[str, int],
        demand: Mapping[str, Sequence[Demand]],
        seen: Seen,
    ) -> None:
        """Judge anew. ``wanted`` are the replicas that each deployment would have, ``demand`` the
        fresh reports of each."""
        if not self._budget.size_bytes:
            return
        now = self._clock.monotonic()
        mine = [
            one
            for one in deployments
            if one.spec.name in wanted and self._budget.concerns(self._drivers, one.spec.driver)
        ]
        names = {one.spec.name for one in mine}
        self._known = {name: self._known.get(name, _Known()) for name in names}
        self._models = {key: one for key, one in self._models.items() if key[0] in names}
        claims = [
            await self._claim(one, wanted[one.spec.name], demand[one.spec.name], seen, now)
            for one in mine
        ]
        other_bytes = 0
        for group in seen.groups:
            if group.deployment not in names and self._is_here(group):
                other_bytes += await self._held(group, 0)
        before = self._verdicts
        self._claims = {one.name: one for one in claims}
        self._verdicts = reside(
            claims, self._budget.size_bytes, now, self._budget.min_residency_s, other_bytes
        )
        self._tell(before, other_bytes)

    def verdict(self, name: str) -> Verdict | None:
        """That of the last look; None: no budget concerns the deployment."""
        return self._verdicts.get(name)

    def note(self, name: str) -> str:
        """What people are told of it, empty if there is nothing to say."""
        verdict, claim = self._verdicts.get(name), self._claims.get(name)
        if verdict is None or claim is None:
            return ""
        need, size = amount_text(claim.need_bytes), amount_text(self._budget.size_bytes)
        if verdict.residence is Residence.TOO_LARGE:
            return (
                f"it needs {need} of memory, more than the budget of {size} "
                "(control.memory_budget) has beside what is pinned: raise it, or make the model "
                "smaller (precision, kv_cache_mb)"
            )
        if verdict.residence is Residence.WAITING:
            leaving = held_by(self._verdicts, Residence.LEAVING)
            held = sum(one.held_bytes for one in self._claims.values())
            free = amount_text(max(self._budget.size_bytes - held, 0))
            said = f"waits for {need} of memory; {free} of {size} are free"
            return f"{said}; leaving: {', '.join(leaving)}" if leaving else said
        if verdict.unload:
            return "others wait for its memory: it finishes its requests and is unloaded"
        if verdict.residence is Residence.UNLOADED and claim.asleep:
            return "put to sleep, and no longer in memory"
        if verdict.residence is Residence.UNLOADED:
            return f"not in memory; a request loads it ({need})"
        return ""

    def shown(self, status: DeploymentStatus) -> DeploymentStatus:
        """The status with what the budget has to say."""
        verdict = self._verdicts.get(status.name)
        if verdict is None:
            return status
        held = self._claims[status.name].held_bytes
        return replace(status, residence=verdict.residence, memory_bytes=held)

    async def _claim(
        self,
        deployment: Deployment,
        wanted: int,
        demand: Sequence[Demand],
        seen: Seen,
        now: float,
    ) -> Claim:
        spec, known = deployment.spec, self._known[deployment.spec.name]
        groups = [one for one in seen.of(spec.name) if self._is_here(one)]
        replicas = [one for group in groups for one in group.observation.replicas]
        present = sum(size_of_group(one.observation) for one in groups)
        asked = any(one.ongoing or one.requests_per_s for one in demand)
        asked = asked or any(seen.busy.get(one.id) for one in replicas)
        answers = any(one.id in seen.ready or one.id in seen.sleeping for one in replicas)
        if asked:
            known.used_at = now
        known.loaded_at = (known.loaded_at or now) if answers else None
        waits = asked and not present
        known.asked_at = (known.asked_at or now) if waits else None
        held = [await self._held(one, spec.memory_mb) for one in groups]
        return Claim(
            spec.name,
            await self._budget.need(fixed(spec, self._version(deployment, groups)), spec.memory_mb),
            self._wish(deployment, wanted, groups, present),
            present=present,
            held_bytes=sum(held),
            asked=asked,
            used_at=known.used_at,
            asked_at=now if known.asked_at is None else known.asked_at,
            loaded_at=known.loaded_at,
            pinned=spec.pinned,
            least=max(spec.min_replicas, 1),
            asleep=bool(spec.asleep),
            failing=not answers and any(is_hopeless(one) for one in replicas),
        )

    def _wish(
        self, deployment: Deployment, wanted: int, groups: Sequence[SeenGroup], present: int
    ) -> int:
        """Replicas of all revisions together: while one replaces another there are more."""
        if deployment.deleting:
            return 0
        if deployment.spec.asleep and not present:
            return 0  # nothing is loaded to be put to sleep
        current = group_name(deployment.spec.name, deployment.revision)
        others = [one for one in groups if one.observation.name != current]
        if not any(size_of_group(one.observation) for one in others):
            return wanted
        if deployment.spec.rollout.kind is Kind.ROLLING:
            return wanted + min(deployment.spec.max_surge, wanted)
        return wanted + max(wanted, 1)

    def _version(self, deployment: Deployment, groups: Sequence[SeenGroup]) -> str:
        """The fixed version of the newest revision, as far as it ever ran here."""
        key = deployment.spec.name, deployment.revision
        for one in groups:
            spec = one.observation.spec
            if spec is not None and spec.revision == deployment.revision:
                self._models[key] = spec.model
        return self._models.get(key, "")

    async def _held(self, group: SeenGroup, memory_mb: int) -> int:
        spec = group.observation.spec
        if spec is None:
            return 0
        return size_of_group(group.observation) * await self._budget.need(spec, memory_mb)

    def _is_here(self, group: SeenGroup) -> bool:
        return self._budget.concerns(self._drivers, group.driver)

    def _tell(self, before: Mapping[str, Verdict], other_bytes: int) -> None:
        held = other_bytes
        for name, verdict in self._verdicts.items():
            earlier = before.get(name)
            if verdict.unload and not (earlier is not None and earlier.unload):
                self._metrics.unloaded()
            held += self._claims[name].held_bytes
        self._metrics.memory(self._budget.size_bytes, held)


def within(step: Plan, verdict: Verdict | None, groups: Sequence[SeenGroup]) -> Plan:
    """The plan, starting no more replicas than the verdict allows."""
    if verdict is None:
        return step
    sizes = {one.observation.name: size_of_group(one.observation) for one in groups}
    actions: list[Action] = []
    for action in step.actions:
        if not isinstance(action, Apply):
            actions.append(action)
            continue
        name = action.spec.name
        size = sizes.get(name, 0)
        others = sum(sizes.values()) - size
        most = max(size, verdict.replicas - others)
        if action.spec.replicas > most:
            action = replace(action, spec=replace(action.spec, replicas=most))
        sizes[name] = max(size, action.spec.replicas)
        actions.append(action)
    return Plan(tuple(actions))


def with_room(deployment: Deployment, verdict: Verdict | None, wanted: int) -> Deployment:
    """The deployment with no larger surge than the memory has room for: where that is none, the old
    replica goes before the new one comes, and requests wait meanwhile."""
    if verdict is None:
        return deployment
    surge = min(deployment.spec.max_surge, max(verdict.replicas - wanted, 0))
    return replace(deployment, spec=replace(deployment.spec, max_surge=surge))


def unloading(groups: Collection[SeenGroup]) -> Plan:
    """Every replica goes; the groups stay, so that the roll-out goes on from where it is."""
    return Plan(
        tuple(
            Apply(
                replace(one.observation.spec, replicas=0),
                frozenset(replica.id for replica in one.observation.replicas),
            )
            for one in groups
            if one.observation.spec is not None and size_of_group(one.observation)
        )
    )
