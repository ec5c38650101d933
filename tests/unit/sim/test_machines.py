"""Machines chosen by production's placement and moved by its spot rule, in virtual time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from cloudlm.control.catalogue.words import Catalogue, Device, Kind, Offer
from cloudlm.control.place import place
from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.figures import ModelFigures
from cloudlm.core.placement import Placement, ServiceLevel, Spot, Traffic
from cloudlm.core.tenant import Outcome
from cloudlm.sim import machines as rented_machines
from cloudlm.sim import placing
from cloudlm.sim.faults import Fault, FaultKind
from cloudlm.sim.figures import bundled
from cloudlm.sim.placing import Placed, placed
from cloudlm.sim.simulation import Policy, Result, Setting, World, simulate
from cloudlm.sim.traffic import Arrival, Lengths, drawn, poisson

START_S = 60.0
ON_DEMAND, CHEAP, MIDDLE, DEAR = 1.0, 0.3, 0.4, 0.5
PLACES = {"a": CHEAP, "b": MIDDLE, "c": DEAR}
USUAL = replace(bundled()["qwen3-0.5b-cpu-bf16"], start_s=START_S)
MODEL = ModelFigures(10**9, 16, 8, 128, 2048, 32_000)
TRAFFIC = Traffic(2.0, 400, 50)


def market(*offers: Offer) -> Catalogue:
    device = Device("fast", Kind.GPU, 24.0, 1000.0, 100.0)
    usual = Offer("aws", "one", "fast", 1, "west", ON_DEMAND, PLACES, ram_gib=32.0)
    return Catalogue({"fast": device}, offers or (usual,), {})


def spec(replicas: int = 4, *, share: float = 1.0, spare: int = 1, **more: Any) -> DeploymentSpec:
    wishes = Placement(
        TRAFFIC,
        ServiceLevel(headroom=0.05),
        Spot(share, spare),
        min_zones=more.pop("min_zones", 1),
        max_kinds=1,
        figures=MODEL,
    )
    return DeploymentSpec(
        "m",
        "models:/m/1",
        min_replicas=replicas,
        max_replicas=replicas,
        placement=replace(wishes, **more.pop("wishes", {})),
        **more,
    )


def policy(asked: DeploymentSpec, catalogue: Catalogue | None = None) -> Policy:
    return Policy("p", asked, "fixed", placed(asked, catalogue or market(), USUAL))


def arrivals(rate: float = 2.0, duration_s: float = 900.0) -> Iterator[Arrival]:
    moments = poisson(Random("1 m"), rate, duration_s)
    return drawn(moments, Random("1 s"), Lengths(400), Lengths(50))


def ran(asked: DeploymentSpec, *faults: Fault, **more: Any) -> Result:
    setting = Setting(USUAL, faults=faults, keep_rows=True)
    return simulate(policy(asked), setting, arrivals(**more), every_s=1.0)


def world(asked: DeploymentSpec, *faults: Fault) -> World:
    """A fleet that runs, with requests until the end of the hour."""
    made = World(policy(asked), Setting(USUAL, faults=faults))
    made.warm_up()
    made.begin(arrivals(0.5, 3600.0), 10.0)
    return made


def standing(made: World) -> dict[tuple[str, bool], int]:
    assert made.machines is not None
    found: dict[tuple[str, bool], int] = {}
    for one in made.machines.rented:
        key = one.zone, one.on_spot
        found[key] = found.get(key, 0) + 1
    return found


# What is chosen ----------------------------------------------------------------------------------


def test_the_machines_are_those_that_production_places() -> None:
    asked = spec()
    found = placed(asked, market(), USUAL)
    decision = place(placing.asked_of(asked, placing._unknown), market())
    assert found.choice == decision.best
    assert found.zones == ["aws/west/a", "aws/west/b", "aws/west/c"]


def test_a_replica_is_as_quick_as_placement_reckons() -> None:
    """At the batch that a machine bears a step takes what ``control.speed`` says."""
    found = placed(spec(), market(), USUAL)
    (kind,) = found.kinds
    step, machine = kind.figures.step, kind.machine
    context = TRAFFIC.prompt_tokens + TRAFFIC.output_tokens / 2
    batch = machine.at_limit.batch
    step_s = step.base_s + batch * (step.sequence_s + context * step.context_token_s)
    speed = placing.speed_of(MODEL, market().devices["fast"], machine.pieces, TRAFFIC)
    assert speed is not None
    assert step_s == pytest.approx(speed.step_s(batch))
    assert step.prefill_token_s * TRAFFIC.prompt_tokens == pytest.approx(speed.prefill_s)
    assert (kind.figures.slots, kind.figures.start_s) == (machine.sequences, START_S)


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"traffic": None}, "placement.traffic is missing"),
        ({"figures": None}, "placement.figures is missing"),
        ({"providers": ("gcp",)}, "1 provider not allowed"),
    ],
)
def test_what_cannot_be_placed_says_why(wishes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        placed(spec(wishes=wishes), market(), USUAL)


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=2), replicas=st.integers(0, 40))
def test_as_many_machines_as_the_replicas_need_and_no_more(
    counts: list[int], replicas: int
) -> None:
    one = placed(spec(), market(), USUAL)
    kinds = tuple(
        replace(one.kinds[0], count=count, machine=replace(one.kinds[0].machine, replicas=each))
        for each, count in enumerate(counts, 1)
    )
    many = Placed(one.choice, one.rules, kinds, USUAL)
    machines = many.machines_for(replicas)
    room = sum(n * kind.machine.replicas for n, kind in zip(machines, kinds, strict=True))
    assert room >= replicas
    assert room - replicas < max(kind.machine.replicas for kind in kinds)


# Who decides -------------------------------------------------------------------------------------


def test_production_is_asked_where_machines_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    decide = rented_machines.decide

    def noted(facts: Any, now: float, rules: Any) -> Any:
        target = decide(facts, now, rules)
        asked.append((facts.needed, sum(target.spot.values()) + target.on_demand))
        return target

    monkeypatch.setattr(rented_machines, "decide", noted)
    ran(spec(), duration_s=60.0)
    assert asked[-1] == (4, 5), "four that bear the load, and one to spare"


def test_spot_stands_spread_over_zones_and_is_paid_for_as_planned() -> None:
    made = world(spec(spare=2))
    made.timeline.run(100.0)
    assert standing(made) == {("a", True): 2, ("b", True): 2, ("c", True): 2}
    result = ran(spec(), duration_s=1200.0)
    assert result.outcomes == {Outcome.FINISHED: result.requests}
    assert result.rent is not None
    assert result.rent.on_demand_h < 0.001, "one backs the first while nothing is ready"
    hours = result.ended_at / 3600.0
    assert result.rent.spot_h == pytest.approx(5 * hours, rel=1e-3)
    assert result.cost == result.rent.usd
    assert pytest.approx(result.cost / hours, rel=1e-3) == 2 * CHEAP + 2 * MIDDLE + DEAR


def test_without_spot_all_stand_on_demand_in_as_many_zones_as_asked() -> None:
    made = world(spec(share=0.0, min_zones=3))
    made.timeline.run(100.0)
    assert standing(made) == {("a", False): 2, ("b", False): 1, ("c", False): 1}


def test_a_machine_to_spare_takes_over_at_once() -> None:
    """No request waits for a start of 60 s: the one to spare has loaded already."""
    fault = Fault(FaultKind.PREEMPTION, 300.0)
    result = ran(spec(), fault)
    assert result.rent is not None
    assert (result.rent.lost, result.outcomes) == (1, {Outcome.FINISHED: result.requests})
    after = [one.ready for one in result.moments if 303.0 < one.at < 340.0]
    assert set(after) == {4}
    bare = ran(spec(share=0.5, spare=0), fault)
    assert min(one.ready for one in bare.moments if 303.0 < one.at < 340.0) == 3


def test_on_demand_stands_in_while_spot_is_missing_and_goes_when_it_is_back() -> None:
    faults = [Fault(FaultKind.NO_SPOT, 300.0, 900.0, zone=f"aws/west/{z}") for z in "abc"]
    made = world(spec(), *faults)
    made.timeline.run(299.0)
    assert not any(not on_spot for _, on_spot in standing(made))
    made.timeline.run(500.0)
    found = standing(made)
    assert sum(n for (_, on_spot), n in found.items() if not on_spot) >= 4
    assert not any(on_spot for _, on_spot in found)
    made.timeline.run(3500.0)
    found = standing(made)
    assert sum(found.values()) == 5
    assert not any(not on_spot for _, on_spot in found)
    assert made.machines is not None
    assert made.machines.rent.lost == 5
    assert made.machines.rent.refused > 0


def test_a_replica_drains_before_its_machine_is_given_back() -> None:
    """From spot to on demand while there is notice, and back again: no request is cut."""
    gone = Fault(FaultKind.NO_SPOT, 100.0, 300.0, notice_s=120.0)
    faults = [replace(gone, zone=f"aws/west/{zone}") for zone in PLACES]
    result = ran(spec(), *faults, duration_s=3000.0)
    assert result.outcomes == {Outcome.FINISHED: result.requests}
    assert not [one for one in result.rows if one.outcome is not Outcome.FINISHED]
    assert result.rent is not None
    assert result.rent.lost >= 5
    assert 0.1 < result.rent.on_demand_h < 2.0, "on demand only until spot is back"


def test_who_refused_is_not_asked_all_the_time() -> None:
    faults = [Fault(FaultKind.NO_SPOT, 100.0, 600.0, zone=f"aws/west/{z}") for z in PLACES]
    result = ran(spec(), *faults)
    assert result.rent is not None
    assert 3 <= result.rent.refused <= 3 * 11


def test_a_notice_is_used_to_be_ready_before_the_machine_goes() -> None:
    result = ran(spec(spare=1), Fault(FaultKind.PREEMPTION, 300.0, notice_s=120.0))
    assert result.outcomes == {Outcome.FINISHED: result.requests}
    assert not [one for one in result.rows if one.outcome is not Outcome.FINISHED]


def test_a_lost_zone_takes_what_stands_there_on_demand_too() -> None:
    fault = Fault(FaultKind.ZONE_LOSS, 300.0, 600.0, zone="aws/west/a")
    made = world(spec(share=0.0, min_zones=3), fault)
    made.timeline.run(310.0)
    assert not any(zone == "a" for zone, _ in standing(made))
    made.timeline.run(500.0)
    assert sum(standing(made).values()) == 4
    assert made.control.ready == 4


def test_nobody_rents_while_control_is_away() -> None:
    away = Fault(FaultKind.CONTROL_CRASH, 290.0, 200.0)
    made = world(spec(), away, Fault(FaultKind.PREEMPTION, 300.0, replicas=3))
    made.timeline.run(480.0)
    assert sum(standing(made).values()) == 2
    made.timeline.run(700.0)
    assert sum(standing(made).values()) == 5


def test_a_machine_of_several_replicas_is_lost_with_all_of_them() -> None:
    big = Offer("aws", "four", "fast", 4, "west", 3.0, PLACES, ram_gib=128.0)
    asked = spec(8, spare=0)
    chosen = placed(asked, market(big), USUAL)
    assert chosen.kinds[0].machine.replicas == 4
    fault = Fault(FaultKind.PREEMPTION, 100.0)
    made = World(Policy("p", asked, "fixed", chosen), Setting(USUAL, faults=(fault,)))
    made.warm_up()
    made.begin(arrivals(0.5, 600.0), 10.0)
    made.timeline.run(99.0)
    assert (sum(standing(made).values()), made.control.ready) == (2, 8)
    made.timeline.run(102.0)
    assert made.control.ready == 4
    made.timeline.run(400.0)
    assert made.control.ready == 8


@given_settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    spare=st.integers(0, 2),
    replicas=st.integers(1, 5),
)
def test_whatever_befalls_machines_every_request_ends_and_the_account_is_right(
    seed: int, share: float, spare: int, replicas: int
) -> None:
    chance = Random(seed)
    faults = []
    for _ in range(6):
        kind = chance.choice(
            [FaultKind.PREEMPTION, FaultKind.NO_SPOT, FaultKind.ZONE_LOSS, FaultKind.CRASH]
        )
        in_zone = kind in (FaultKind.NO_SPOT, FaultKind.ZONE_LOSS)
        faults.append(
            Fault(
                kind,
                chance.uniform(0.0, 500.0),
                chance.uniform(10.0, 200.0),
                replicas=chance.randint(1, 3),
                zone=f"aws/west/{chance.choice('abc')}" if in_zone else "",
                notice_s=chance.choice([0.0, 30.0]),
            )
        )
    setting = Setting(USUAL, faults=tuple(sorted(faults, key=lambda one: one.at)), seed=seed)
    made = World(policy(spec(replicas, share=share, spare=spare)), setting)
    made.warm_up()
    made.begin(arrivals(0.5, 500.0), 10.0)
    made.timeline.run()
    assert made.books.open == 0
    assert made.machines is not None
    berths = [unit for one in made.machines.rented for unit in one.units]
    assert len(berths) == len(set(berths)) <= replicas, "no machine bears a replica of another"
    made.machines.settle()
    rent, hours = made.machines.rent, made.timeline.now / 3600.0
    least, most = (CHEAP, DEAR) if rent.spot_h else (0.0, 0.0)
    assert least * rent.spot_h <= rent.spot_usd + 1e-9 <= most * rent.spot_h + 2e-9
    assert rent.on_demand_usd == pytest.approx(ON_DEMAND * rent.on_demand_h)
    assert rent.spot_h + rent.on_demand_h <= (2 * replicas + 2 * spare + 2) * hours
