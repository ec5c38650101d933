"""Control and held requests in virtual time: production's scaler, told what production is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.scaling import Algorithm, Scaling
from cloudlm.core.schedule import Schedule
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import Outcome
from cloudlm.gateway.capacity import Capacities, herd_is_over
from cloudlm.gateway.waiting import DOUBLE_EVERY_S
from cloudlm.sim.control import AUTOSCALERS, scaled
from cloudlm.sim.faults import Fault, FaultKind
from cloudlm.sim.figures import Figures
from cloudlm.sim.fit import StepTime
from cloudlm.sim.gateway import SimGateway
from cloudlm.sim.simulation import Policy, Setting, World, simulate
from cloudlm.sim.traffic import Arrival, Lengths, drawn, poisson
from cloudlm.state.news import SELDOM_S, SETTLE_S

START_S = 20.0
FIGURES = Figures(
    "t", StepTime(0.02, 0.0002, 0.0, 0.0), slots=4, start_s=START_S, cache_tokens=50_000
)
SPEC = DeploymentSpec("m", "models:/m/1", max_replicas=8, target_ongoing_requests=4.0)
HERD = tuple(Arrival(30.0 + number * 0.001, 100, 20) for number in range(40))


def arrivals(rate: float = 4.0, duration_s: float = 200.0) -> Iterator[Arrival]:
    moments = poisson(Random("1 m"), rate, duration_s)
    return drawn(moments, Random("1 s"), Lengths(400), Lengths(60))


def begun(spec: DeploymentSpec, requests: Any, autoscaler: str = "", **more: Any) -> World:
    world = World(Policy("p", spec, autoscaler), replace(Setting(FIGURES), **more))
    world.warm_up()
    world.begin(requests, 10.0)
    return world


def sleepy(**more: Any) -> DeploymentSpec:
    return replace(SPEC, min_replicas=0, scaling=Scaling(idle_s=25.0), **more)


# Who decides -------------------------------------------------------------------------------------


@pytest.mark.parametrize("autoscaler", AUTOSCALERS)
def test_every_autoscaler_answers_all(autoscaler: str) -> None:
    result = simulate(Policy("p", SPEC, autoscaler), Setting(FIGURES), arrivals())
    assert result.outcomes == {Outcome.FINISHED: result.requests}
    assert 1 < result.most_replicas <= 8
    if autoscaler == "fixed":
        assert {one.ready for one in result.moments} == {8}


def test_without_a_name_the_spec_decides() -> None:
    hpa = replace(SPEC, scaling=Scaling(Algorithm.HPA, utilization=0.5))
    named = simulate(Policy("p", hpa, "hpa"), Setting(FIGURES), arrivals())
    own = simulate(Policy("p", hpa), Setting(FIGURES), arrivals())
    assert named.moments == own.moments
    other = simulate(Policy("p", hpa, "tokens"), Setting(FIGURES), arrivals())
    assert other.moments != own.moments


def test_settings_make_a_difference() -> None:
    hours = []
    for share in (0.4, 1.0):
        spec = replace(SPEC, scaling=Scaling(Algorithm.HPA, utilization=share))
        result = simulate(Policy("p", spec), Setting(FIGURES), arrivals(6.0, 600.0))
        hours.append(result.replica_hours)
    assert hours[0] > 1.1 * hours[1]


def test_settings_that_do_not_go_together_are_refused() -> None:
    spec = replace(SPEC, scaling=Scaling(target_ttft_ms=500.0))
    with pytest.raises(InvalidRequest, match="kpa follows requests at once alone"):
        scaled(spec, "kpa")


# Facts -------------------------------------------------------------------------------------------


def test_starts_and_paces_are_measured_and_outlive_control() -> None:
    world = begun(SPEC, arrivals(), faults=(Fault(FaultKind.CONTROL_CRASH, 150.0),))
    world.state.paces.clear()
    world.timeline.run(149.0)
    pace = world.state.paces["m", "models:/m/1"]
    assert pace.start_s == pytest.approx(START_S, abs=1.0)
    assert pace.known
    assert pace.prompt_token_s > 0.0
    assert pace.token_s(1.0) == pytest.approx(0.02, rel=0.5)
    world.timeline.run(150.5)
    assert world.control.wanted > 1
    assert world.state.paces["m", "models:/m/1"].start_s == pace.start_s


def test_schedules_follow_simulated_wall_time() -> None:
    # Simulations begin at 22:13:20 UTC; a replica is started so early that it answers at 22:16.
    night = Schedule("16 22 * * *", 60.0, min_replicas=5)
    world = begun(replace(SPEC, scaling=Scaling(schedules=(night,))), arrivals(0.2, 400.0))
    world.timeline.run(130.0)
    assert world.control.wanted == 1
    world.timeline.run(160.0 + 2.0)
    assert world.control.ready == 5
    world.timeline.run(400.0)
    assert world.control.wanted == 1


# Zero --------------------------------------------------------------------------------------------


@pytest.mark.promise(19)
def test_requests_are_held_while_one_replica_starts() -> None:
    world = begun(sleepy(max_replicas=1), HERD)
    world.timeline.run(29.0)
    assert world.control.wanted == 0
    assert not world.fleet.units
    world.timeline.run(30.5)
    assert world.gateways[0].queued == len(HERD)
    (unit,) = world.fleet.units.values()
    assert unit.began_at == pytest.approx(30.0, abs=0.2)  # control was told at once
    most, at = 0, 30.5
    while world.books.open:
        at += 0.05
        world.timeline.run(at)
        serving = next(iter(world.fleet.units.values())).serving
        most = max(most, serving.running + serving.waiting if serving else 0)
    assert most == 4  # not the whole herd
    assert world.books.outcomes[Outcome.FINISHED] == len(HERD)
    assert min(world.books.ttft) == pytest.approx(START_S, abs=0.6)


def test_who_is_held_looks_when_there_is_news_and_not_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[float] = []
    look = SimGateway._look_out

    def noted(self: SimGateway, told: bool) -> bool:
        looks.append(self.timeline.now)
        return look(self, told)

    monkeypatch.setattr(SimGateway, "_look_out", noted)
    world = begun(sleepy(max_replicas=1), HERD)
    written: list[float] = []
    world.state.tell_of_writes(lambda: written.append(world.timeline.now))
    world.timeline.run(30.0 + START_S + 2.0)
    (came,) = [at for at in written if at > 30.0]
    waiting = [at for at in looks if at < came]
    assert len(waiting) <= 2 + START_S / SELDOM_S
    assert min(at for at in looks if at > came) == pytest.approx(came + SETTLE_S)


def test_where_always_somebody_waits_a_replica_gets_twice_as_many_every_few_seconds() -> None:
    """A herd that comes faster than its first share is answered, as in ``gateway.waiting``."""
    herd = [Arrival(30.0 + n * 0.05, 100, 400) for n in range(600)]
    patient = GatewaySettings(hold_timeout_s=600.0, queue_timeout_s=600.0)
    world = begun(sleepy(max_replicas=1), herd, gateway=patient)
    most: list[int] = []
    for later_s in (1.0, 1.0 + DOUBLE_EVERY_S, 1.0 + 2 * DOUBLE_EVERY_S):
        world.timeline.run(30.0 + START_S + 1.0 + later_s)
        most.append(world.gateways[0]._capacity())
    assert most == [4, 8, 16]


def test_the_last_replica_goes_when_nobody_asks() -> None:
    requests = (*HERD, Arrival(200.0, 100, 20))
    result = simulate(Policy("p", sleepy()), Setting(FIGURES), requests, every_s=1.0)
    assert result.outcomes == {Outcome.FINISHED: len(requests)}
    ready = {one.at: one.ready for one in result.moments}
    assert ready[29.0] == 0
    assert ready[55.0] > 0
    assert ready[199.0] == 0


def test_who_is_held_too_long_is_refused() -> None:
    short = GatewaySettings(hold_timeout_s=5.0)
    result = simulate(Policy("p", sleepy()), Setting(FIGURES, gateway=short), HERD)
    assert result.outcomes == {Outcome.REFUSED: len(HERD)}


@pytest.mark.promise(19)
def test_many_gateways_hold_for_one_start() -> None:
    result = simulate(Policy("p", sleepy(max_replicas=1)), Setting(FIGURES, gateways=3), HERD)
    assert result.outcomes == {Outcome.FINISHED: len(HERD)}
    assert result.most_replicas == 1


def test_what_a_model_takes_at_once() -> None:
    capacities = Capacities(10)
    assert capacities.of("m") == 0
    capacities.follow({"m": 3, "n": 1})
    capacities.narrow("m", 2)
    assert (capacities.of("m"), capacities.of("n")) == (6, 10)
    capacities.narrow("m", 99)
    assert capacities.of("m") == 30
    assert capacities.widen("m")
    assert not capacities.widen("m")
    assert list(capacities) == ["m", "n"]
    assert herd_is_over(0, 5, answers=True)
    assert herd_is_over(0, 0, answers=False)
    assert not herd_is_over(0, 5, answers=False)
    assert not herd_is_over(1, 1, answers=True)
