"""Who is in this machine's memory: gathers the facts for ``residency``, remembers what it must, and
says what the verdicts mean for a deployment's plan (``room``) and status.

Unloading stops the processes instead of putting them to sleep. A sleeping worker keeps its own
libraries' memory (260 MiB as measured), so that fifty of them would take 13 GiB, which no budget
could give to models; the price is a start instead of a waking (4.8 s instead of 0.1 s for a model
of a megabyte; docs/concepts/deployment.md). Must not start or stop anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cloudlm.control.budget import MemoryBudget, fixed
from cloudlm.control.drivers import Drivers
from cloudlm.control.footprint import PROCESS_BYTES
from cloudlm.control.memory_notes import leaving_text, memory_note
from cloudlm.control.metrics import ControlMetrics
from cloudlm.control.misfits import Sizes, is_moving, why_never
from cloudlm.control.observe import Seen, SeenGroup
from cloudlm.control.plan import size_of_group
from cloudlm.control.residency import Claim, Verdict, reside
from cloudlm.control.room import Room, Wish, in_order_of_going
from cloudlm.control.uses import Uses
from cloudlm.core.clock import Clock
from cloudlm.core.deployment import Deployment, DeploymentStatus, Residence
from cloudlm.core.errors import BrokenModel, CloudlmError
from cloudlm.core.health import is_hopeless
from cloudlm.telemetry.logs import get_logger

LEAST_START_S = 60.0
"""What starts is given so long at least before it counts as one that does not come up."""
_log = get_logger(__name__)


class Residents:
    """What is remembered of all deployments; all of it may be lost with the process."""

    def __init__(
        self, budget: MemoryBudget, drivers: Drivers, clock: Clock, metrics: ControlMetrics
    ) -> None:
        self._budget = budget
        self._drivers = drivers
        self._clock = clock
        self._metrics = metrics
        self._known: dict[str, Uses] = {}
        self._wishes: dict[str, Wish] = {}
        self._claims: dict[str, Claim] = {}
        self._verdicts: dict[str, Verdict] = {}
        self._unknown: dict[str, str] = {}
        self._never: dict[str, str] = {}
        self._other_bytes = 0
        self._is_blind = False

    async def look(self, wishes: Sequence[Wish], seen: Seen) -> None:
        """Judge anew."""
        if not self._budget.size_bytes:
            return
        now = self._clock.monotonic()
        self._wishes = {one.name: one for one in wishes if self._concerns(one, seen)}
        self._known = {name: self._known.get(name, Uses()) for name in self._wishes}
        self._unknown, self._is_blind = {}, False
        before, claims = self._verdicts, dict[str, Claim]()
        for name, wish in self._wishes.items():
            try:
                fault = self._fault_of(wish, seen)
                claims[name] = fault or await self._claim(wish, seen, now)
            except Exception:  # one deployment's trouble is no other's
                _log.exception("memory_not_known", extra={"fields": {"deployment": name}})
                claims[name] = self._unchanged(wish, seen)
        others = await self._others(seen)
        unheard = any(self._is_here(one) for one in seen.faults)  # what it ran is there still
        self._other_bytes = max(others, self._other_bytes) if unheard else others
        if self._is_blind:
            claims = {name: replace(one, wanted=one.staying) for name, one in claims.items()}
        self._claims = claims
        self._verdicts = reside(
            list(claims.values()),
            self._budget.size_bytes,
            now,
            self._budget.min_residency_s,
            self._other_bytes,
        )
        self._never = {name: await self._why_never(one) for name, one in self._wishes.items()}
        self._tell(before)

    def room(
        self, deployment: Deployment, wished: int, seen: Seen, homes: Mapping[str, str]
    ) -> Room:
        """What the last look leaves a deployment. ``homes`` are the drivers of groups that are not
        there yet; those not named begin at the deployment's."""
        name = deployment.spec.name
        verdict, wish = self._verdicts.get(name), self._wishes.get(name)
        if verdict is None or wish is None:
            return Room(wished)
        groups, claim = seen.of(name), self._claims[name]
        note = "" if deployment.deleting else self._note(wish, verdict)
        untold = name in self._unknown and not claim.present and wished > 0
        stays_out = untold or verdict.residence is Residence.TOO_LARGE
        drivers = {wish.target: deployment.spec.driver, **homes}
        drivers |= {one.observation.name: one.driver for one in groups}
        return Room(
            wished,
            verdict,
            claim,
            tuple(one.observation for one in groups),
            frozenset(one for one, driver in drivers.items() if self._is_here(driver)),
            wish.target,
            wish.stable,
            note,
            note if stays_out else "",
            self._never.get(name, ""),
        )

    def shown(self, status: DeploymentStatus) -> DeploymentStatus:
        """The status with what the budget has to say."""
        verdict = self._verdicts.get(status.name)
        if verdict is None:
            return status
        held = self._claims[status.name].held_bytes
        return replace(status, residence=verdict.residence, memory_bytes=held)

    def _note(self, wish: Wish, verdict: Verdict) -> str:
        """What people are told of it, empty if there is nothing to say."""
        return memory_note(
            wish,
            verdict,
            self._claims,
            self._budget.size_bytes,
            self._other_bytes,
            self._unknown.get(wish.name, ""),
            leaving_text(wish, self._wishes, self._verdicts),
        )

    # Claims -------------------------------------------------------------------------------------

    async def _claim(self, wish: Wish, seen: Seen, now: float) -> Claim:
        spec, known = wish.sized.spec, self._known[wish.name]
        groups = self._here(wish, seen)
        replicas = [one for group in groups for one in group.observation.replicas]
        present = sum(size_of_group(one.observation) for one in groups)
        asked = any(one.ongoing or one.requests_per_s for one in wish.demand)
        asked = asked or any(seen.busy.get(one.id) for one in replicas)
        answers = any(one.id in seen.ready or one.id in seen.sleeping for one in replicas)
        known.note(now, asked=asked, answers=answers, present=bool(present))
        limit_s = max(wish.deployment.spec.rollout.start_timeout_s, LEAST_START_S)
        hangs = known.began_at is not None and now - known.began_at >= limit_s
        wanted = self._wanted(wish, groups, present)
        need_bytes, sizes_bytes = 0, tuple[int, ...]()
        try:
            need_bytes = await self._need(wish, groups)
        except CloudlmError as error:
            self._unknown[wish.name] = error.message
            wanted = min(wanted, present)
        for group in groups:
            size = size_of_group(group.observation)
            sizes_bytes += (await self._replica_bytes(group, spec.memory_mb),) * size
        return Claim(
            spec.name,
            need_bytes,
            wanted,
            present=present,
            held_bytes=sum(sizes_bytes),
            asked=asked,
            used_at=known.used_at,
            asked_at=now if known.asked_at is None else known.asked_at,
            loaded_at=known.loaded_at,
            pinned=spec.pinned,
            least=max(spec.min_replicas, 1),
            asleep=bool(spec.asleep),
            failing=not answers and (hangs or any(is_hopeless(one) for one in replicas)),
            sizes_bytes=sizes_bytes,
        )

    def _unchanged(self, wish: Wish, seen: Seen) -> Claim:
        """Of a deployment whose facts cannot be had: it keeps what it has and starts nothing."""
        present = sum(size_of_group(one.observation) for one in self._here(wish, seen))
        self._unknown[wish.name] = "see control's log"
        fresh = Claim(wish.name, 0, present, held_bytes=present * PROCESS_BYTES)
        before = self._claims.get(wish.name, fresh)
        return replace(before, wanted=present, present=present, sizes_bytes=())

    def _fault_of(self, wish: Wish, seen: Seen) -> Claim | None:
        """The claim of a deployment whose driver here cannot tell of it now: what it had. What one
        holds that was never looked at is not known, so that nothing may start."""
        stable = wish.moving.revision
        specs = (wish.sized.spec, wish.deployment.spec, *(() if stable is None else (stable.spec,)))
        faults = [seen.faults[one.driver] for one in specs if one.driver in seen.faults]
        if not any(one.driver in seen.faults and self._is_here(one.driver) for one in specs):
            return None
        self._unknown[wish.name] = faults[0].message
        before = self._claims.get(wish.name)
        self._is_blind |= before is None
        before = before or Claim(wish.name, 0, 0)
        return replace(before, wanted=before.present)

    def _wanted(self, wish: Wish, groups: Sequence[SeenGroup], present: int) -> int:
        """Replicas here of all revisions together: while one replaces another there are more."""
        if wish.deployment.deleting:
            return 0
        if wish.sized.spec.asleep and not present:
            return 0  # nothing is loaded to be put to sleep
        if self._is_kept_out(wish, groups):
            return wish.wanted
        target_is_here = self._is_here(wish.deployment.spec.driver)
        if wish.moving.size is None:
            if not target_is_here:
                return present  # they go as the plan says
            others = any(
                size_of_group(one.observation)
                for one in groups
                if one.observation.name != wish.target
            )
            surge = wish.deployment.spec.max_surge if others else 0
            return wish.wanted + min(surge, wish.wanted)
        stable = wish.moving.revision
        stays = stable is not None and self._is_here(stable.spec.driver)
        return (wish.wanted if stays else 0) + (wish.moving.size if target_is_here else 0)

    async def _need(self, wish: Wish, groups: Sequence[SeenGroup]) -> int:
        """What one more replica takes, of any revision that may start. Raises CloudlmError."""
        memory_mb, needs = wish.sized.spec.memory_mb, [0]
        if not any(size_of_group(one.observation) for one in groups):  # any of them may come back
            needs += [await self._replica_bytes(one, memory_mb) for one in groups]
        kept_out = self._is_kept_out(wish, groups)
        staged = wish.moving.size is not None
        stable = wish.moving.revision if staged or kept_out else None
        if stable is not None and self._is_here(stable.spec.driver):
            needs.append(await self._budget.need(fixed(stable.spec, stable.model), memory_mb))
        if self._is_here(wish.deployment.spec.driver) and not kept_out:
            specs = [one.observation.spec for one in groups if one.observation.name == wish.target]
            version = next((one.model for one in specs if one is not None), wish.version)
            spec = fixed(wish.deployment.spec, version)
            needs.append(await self._budget.need(spec, memory_mb))
        return max(needs)

    async def _replica_bytes(self, group: SeenGroup, memory_mb: int) -> int:
        """What one replica of a group holds. Where that is not known for now, nothing may start."""
        spec = group.observation.spec
        if spec is None:
            return 0
        try:
            return await self._budget.need(spec, memory_mb)
        except BrokenModel:
            return PROCESS_BYTES  # nor could it be loaded again
        except CloudlmError:
            self._is_blind = True
            return PROCESS_BYTES

    async def _why_never(self, wish: Wish) -> str:
        """Why the target of its roll-out can never be here, empty if nothing is against it, or if
        its size is not known."""
        here = self._is_here(wish.deployment.spec.driver)
        if wish.name in self._unknown or not here or not is_moving(wish):
            return ""
        try:
            sizes = await self._sizes(wish)
        except CloudlmError:
            return ""
        return why_never(wish, sizes, self._claims, self._budget.size_bytes)

    async def _sizes(self, wish: Wish) -> Sizes:
        """What one replica of its target takes, and of its stable revision here. Raises
        CloudlmError if that cannot be told now."""
        memory_mb, stable = wish.sized.spec.memory_mb, wish.moving.revision
        spec = fixed(wish.deployment.spec, wish.version)
        target_bytes = await self._budget.need(spec, memory_mb)
        if stable is None or not self._is_here(stable.spec.driver):
            return Sizes(target_bytes)
        running = fixed(stable.spec, stable.model)
        return Sizes(target_bytes, await self._budget.need(running, memory_mb))

    def _is_kept_out(self, wish: Wish, groups: Sequence[SeenGroup]) -> bool:
        """Whether the last look found that its target can never be here, and none of it is: what
        runs goes on as if it were not asked for (``rollout``)."""
        if wish.moving.size is not None or not self._never.get(wish.name) or not is_moving(wish):
            return False
        stable = wish.moving.revision
        if stable is None or not self._is_here(stable.spec.driver):
            return False
        return not any(
            size_of_group(one.observation) for one in groups if one.observation.name == wish.target
        )

    async def _others(self, seen: Seen) -> int:
        """What is held here and belongs to no deployment (any more)."""
        found = 0
        for group in seen.groups:
            if group.deployment not in self._wishes and self._is_here(group.driver):
                found += size_of_group(group.observation) * await self._replica_bytes(group, 0)
        return found

    def _concerns(self, wish: Wish, seen: Seen) -> bool:
        """Whether any of it is or would be in this machine's memory."""
        there = any(size_of_group(one.observation) for one in self._here(wish, seen))
        return there or self._is_here(wish.sized.spec.driver)

    def _here(self, wish: Wish, seen: Seen) -> list[SeenGroup]:
        """Its groups on this machine, those whose replicas go first at the beginning."""
        found = {g.observation.name: g for g in seen.of(wish.name) if self._is_here(g.driver)}
        groups = [one.observation for one in found.values()]
        return [found[one.name] for one in in_order_of_going(groups, wish.stable, wish.target)]

    def _is_here(self, driver: str) -> bool:
        return self._budget.concerns(self._drivers, driver)

    def _tell(self, before: Mapping[str, Verdict]) -> None:
        held = self._other_bytes
        for name, verdict in self._verdicts.items():
            earlier = before.get(name)
            if verdict.unload and not (earlier is not None and earlier.unload):
                self._metrics.unloaded()
            held += self._claims[name].held_bytes
        self._metrics.memory(self._budget.size_bytes, held)
