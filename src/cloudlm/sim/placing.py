"""A deployment placed by production's own rule, as a fleet in virtual time needs it: the machines
that ``control.place`` chooses, and how quick a replica is on each.

The speed is the very one by which the machines were chosen (``control.speed``), so that a
simulation shows what the choice is worth under traffic that is no mean. Must not choose, and must
not know what befalls the machines (``machines``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cloudlm.control.asking import asked_of
from cloudlm.control.catalogue.words import Catalogue, Offer
from cloudlm.control.offers import Asked, Machine
from cloudlm.control.place import Choice, Decision, place, rules_of
from cloudlm.control.speed import speed_of
from cloudlm.control.spot import SpotRules
from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.figures import ModelFigures
from cloudlm.sim.figures import Figures
from cloudlm.sim.fit import StepTime


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of machines: so many of them bear the load that was planned with. ``figures`` are
    those of a replica there."""

    machine: Machine
    count: int
    figures: Figures

    @property
    def offer(self) -> Offer:
        return self.machine.offer

    @property
    def on_demand(self) -> float:
        """Dollars per hour of one that stays."""
        assert self.offer.on_demand is not None  # ``judge`` lets no others pass
        return self.offer.on_demand


@dataclass(frozen=True, slots=True)
class Placed:
    """What production chose: the kinds of machines, that which costs least per request first, and
    the rules by which those on spot stand and move. ``usual`` are the scenario's own figures."""

    choice: Choice
    rules: SpotRules
    kinds: tuple[Kind, ...]
    usual: Figures

    @property
    def zones(self) -> list[str]:
        """Names of all zones in which its machines may be."""
        return sorted({zone_name(kind.offer, zone) for kind in self.kinds for zone in zones(kind)})

    def machines_for(self, replicas: int) -> list[int]:
        """Machines of each kind for so many replicas: as many as planned of the first kind, then of
        the others; what is beyond the plan stands on the first."""
        left, found = replicas, []
        for kind in self.kinds:
            count = min(kind.count, math.ceil(left / kind.machine.replicas))
            left = max(0, left - count * kind.machine.replicas)
            found.append(count)
        found[0] += math.ceil(left / self.kinds[0].machine.replicas)
        return found


def zones(kind: Kind) -> tuple[str, ...]:
    """The zones of a kind, as its offer names them."""
    return kind.offer.zones


def zone_name(offer: Offer, zone: str) -> str:
    """What a scenario calls a zone: ``aws/eu-central-1/euc1-az1``, or the region where its zones
    are not told apart."""
    return offer.place if zone == offer.region else f"{offer.place}/{zone}"


def placed(spec: DeploymentSpec, catalogue: Catalogue, usual: Figures) -> Placed:
    """Where production would place a deployment, its model's figures being in its placement.
    ``usual`` says what the catalogue does not: how long a start takes, how many may wait. Raises
    InvalidRequest if nothing is left to choose, saying why."""
    asked = asked_of(spec, _unknown)
    decision = place(asked, catalogue)
    if decision.best is None:
        raise InvalidRequest(
            f"{spec.name}: no offer of the catalogue bears this placement ({_why(decision)}); "
            "'cloudlm plan' shows each",
            param="deployment.placement",
        )
    parts = sorted(
        decision.best.parts,
        key=lambda part: part.usd_per_h / (part.count * part.machine.requests_per_s),
    )
    kinds = tuple(
        Kind(part.machine, part.count, figures_on(part.machine, asked, catalogue, usual))
        for part in parts
    )
    return Placed(decision.best, rules_of(asked.placement), kinds, usual)


def figures_on(machine: Machine, asked: Asked, catalogue: Catalogue, usual: Figures) -> Figures:
    """A replica's figures on a machine: a step as ``control.speed`` reckons it, exact alone and at
    the machine's limit, and the way to the region and back for each request."""
    device = catalogue.devices[machine.offer.device]
    speed = speed_of(asked.figures, device, machine.pieces, asked.traffic, asked.placement.measured)
    assert speed is not None  # or the machine would have lost
    traffic, batch = asked.traffic, max(1.0, machine.at_limit.batch)
    fresh = traffic.prompt_tokens * (1 - traffic.cached_share)
    context = traffic.prompt_tokens + traffic.output_tokens / 2
    base_s = min(speed.weights_s, speed.active_s * batch)
    beyond_s = max(0.0, (speed.step_s(batch) - base_s) / batch - speed.sequence_s)
    each_s, token_s = beyond_s, speed.sequence_s / context
    if not speed.estimated:  # it was measured with the sequences, whatever their context
        each_s, token_s = beyond_s + speed.sequence_s, 0.0
    request_s = usual.step.request_s + machine.network_ms / 1000
    return replace(
        usual,
        name=machine.offer.key,
        step=StepTime(base_s, speed.prefill_s / fresh, each_s, token_s, request_s),
        slots=machine.sequences,
        batch_tokens=asked.batch.tokens,
        cache_tokens=machine.sequences * asked.need.sequence_tokens,
        measured="",
        source="control.speed",
        rows=(),
    )


def _unknown(spec: DeploymentSpec) -> ModelFigures:
    raise InvalidRequest(
        f"{spec.name}: placement.figures is missing: a simulation asks no registry for the model's "
        "numbers (parameters, layers, kv_heads, head_dim, hidden_size, vocab_size)",
        param="deployment.placement.figures",
    )


def _why(decision: Decision) -> str:
    reasons: dict[str, int] = {}
    for one in decision.lost:
        reasons[one.reason.value] = reasons.get(one.reason.value, 0) + 1
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "it has none"
