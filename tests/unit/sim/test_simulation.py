"""Whole simulations: equal seeds are equal, every arrival ends once, faults do as they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.control.blackout import BELIEVED_AFTER_S
from cloudlm.core.deployment import Demand, DeploymentSpec
from cloudlm.core.routing import Policy as Route
from cloudlm.core.routing import Routing
from cloudlm.core.settings import ControlSettings, GatewaySettings
from cloudlm.core.tenant import Outcome
from cloudlm.gateway.view import READ_TIMEOUT_S
from cloudlm.sim.faults import Fault, FaultKind, drawn_faults
from cloudlm.sim.figures import Figures
from cloudlm.sim.fit import StepTime
from cloudlm.sim.ground import Zone
from cloudlm.sim.measure import spread_of
from cloudlm.sim.report import result_body
from cloudlm.sim.simulation import Policy, Result, Setting, World, simulate
from cloudlm.sim.state import Trouble
from cloudlm.sim.traffic import PATTERNS, Arrival, Lengths, drawn, poisson

FIGURES = Figures(
    "t", StepTime(0.02, 0.0002, 0.002, 0.0), slots=4, start_s=20.0, cache_tokens=20_000
)
ZONES = (Zone("a", 1.0), Zone("b", 2.0))


def arrivals(seed: int = 1, rate: float = 3.0, duration_s: float = 120.0) -> Iterator[Arrival]:
    prefixes = PATTERNS["conversations"](Random(f"{seed} p"), 128, count=20)
    moments = poisson(Random(f"{seed} m"), rate, duration_s)
    return drawn(moments, Random(f"{seed} s"), Lengths(400), Lengths(40), prefixes, ("x", "y"))


def policy(replicas: int = 3, **more: Any) -> Policy:
    spec = DeploymentSpec("m", "models:/m/1", min_replicas=replicas, max_replicas=replicas)
    return Policy("p", replace(spec, **more))


def setting(**more: Any) -> Setting:
    return replace(Setting(FIGURES, ZONES, keep_rows=True), **more)


def check_conserved(result: Result) -> None:
    """Every arrival ended once, every attempt left one row, no token was lost or doubled."""
    assert result.open == 0
    assert sum(result.outcomes.values()) == result.requests
    assert len(result.rows) == result.attempts
    assert len({row.id for row in result.rows}) == len(result.rows)
    tokens: Counter[str] = Counter()
    ended: dict[str, Outcome] = {}
    for row in result.rows:
        tokens[row.request_id] += row.completion_tokens
        ended[row.request_id] = row.outcome
    finished = [name for name, outcome in ended.items() if outcome is Outcome.FINISHED]
    assert sum(tokens[name] for name in finished) == result.output_tokens
    assert len(finished) == result.outcomes.get(Outcome.FINISHED, 0)


def test_the_same_seed_gives_the_same() -> None:
    chance = drawn_faults(Random(5), dict.fromkeys(FaultKind, 60.0), 120.0, ["a", "b"])
    world = setting(faults=tuple(chance), seed=3)
    scaled = policy(4, max_replicas=9, target_ongoing_requests=3.0)
    first, second = (simulate(scaled, world, arrivals()) for _ in range(2))
    assert result_body(first) == result_body(second)
    assert first.rows == second.rows
    other = simulate(scaled, replace(world, seed=4), arrivals())
    assert other.rows != first.rows


RATES = st.dictionaries(st.sampled_from(FaultKind), st.sampled_from([30.0, 200.0]))


@settings(max_examples=40, deadline=None)
@given(RATES, st.integers(0, 2**32), st.sampled_from(Route), st.integers(1, 3))
def test_every_arrival_ends_once_whatever_fails(
    rates: dict[FaultKind, float], seed: int, route: Route, gateways: int
) -> None:
    faults = drawn_faults(Random(seed), rates, 60.0, ["a", "b"])
    few = GatewaySettings(replica_capacity=4, max_queued_requests=10, queue_timeout_s=5.0)
    world = setting(faults=tuple(faults), seed=seed, gateways=gateways, gateway=few)
    one = policy(2, max_replicas=5, target_ongoing_requests=2.0, routing=Routing(policy=route))
    result = simulate(one, world, arrivals(seed, 5.0, 60.0))
    assert result.faults == len([fault for fault in faults if fault.at < result.ended_at])
    check_conserved(result)


def test_without_faults_all_is_answered_and_paid() -> None:
    result = simulate(policy(4), setting(), arrivals())
    check_conserved(result)
    assert result.outcomes == {Outcome.FINISHED: result.requests}
    assert result.replica_hours == pytest.approx(4 * result.ended_at / 3600)
    assert result.cost == pytest.approx(result.ended_at / 3600 * (2 * 1.0 + 2 * 2.0))
    assert 0.1 < result.cache_hits < 1.0


@pytest.mark.parametrize("route", [Route.WEIGHTED, Route.POWER_OF_TWO])
def test_policies_that_draw_spread_requests_as_in_the_gateway(route: Route) -> None:
    result = simulate(policy(4, routing=Routing(policy=route)), setting(), arrivals())
    check_conserved(result)
    counts = Counter(row.replica for row in result.rows)
    assert len(counts) == 4
    assert max(counts.values()) < 2 * min(counts.values())


def test_an_empty_trace_ends() -> None:
    result = simulate(policy(), setting(), [])
    assert result.requests == result.open == 0


def test_it_scales_with_demand_and_waits_for_starts() -> None:
    scaled = policy(1, max_replicas=8, target_ongoing_requests=2.0)
    result = simulate(scaled, setting(), arrivals(rate=8.0), every_s=1.0)
    check_conserved(result)
    assert result.most_replicas > 3
    grown = next(one.at for one in result.moments if one.exist > 1)
    ready = next(one.at for one in result.moments if one.ready > 1)
    assert ready - grown == pytest.approx(FIGURES.start_s, abs=2.0)


def test_a_cold_fleet_refuses_until_a_replica_answers() -> None:
    result = simulate(policy(1), setting(warm=False), arrivals())
    refused = result.outcomes[Outcome.REFUSED]
    early = sum(one.at < FIGURES.start_s for one in arrivals())
    assert early <= refused <= early + 10
    check_conserved(result)


# Faults ------------------------------------------------------------------------------------------


def run_until(world: World, at: float) -> None:
    world.timeline.run(at)


def begun(*faults: Fault, replicas: int = 3, **more: Any) -> World:
    one = World(policy(replicas), setting(faults=faults, **more))
    one.warm_up()
    one.begin(arrivals(), 10.0)
    return one


def answering(world: World) -> int:
    return sum(unit.serving is not None for unit in world.fleet.units.values())


def test_a_crash_loses_nothing_that_others_can_go_on_with() -> None:
    fault = Fault(FaultKind.CRASH, 30.05, replicas=2)
    world = begun(fault)
    run_until(world, 30.04)
    held = sum(len(unit.open) for unit in world.fleet.units.values())
    assert held
    run_until(world, 30.1)
    assert answering(world) == 1
    run_until(world, 60.0)
    assert answering(world) == 3  # after back-off and start
    result = simulate(policy(), setting(faults=(fault,)), arrivals())
    check_conserved(result)
    assert result.outcomes == {Outcome.FINISHED: result.requests}
    assert result.resumed + result.retried > 0


@pytest.mark.promise(30)
def test_a_zone_is_lost_and_its_replicas_start_elsewhere() -> None:
    world = begun(Fault(FaultKind.ZONE_LOSS, 30.0, zone="a", duration_s=60.0))
    run_until(world, 80.0)
    assert {unit.zone.name for unit in world.fleet.units.values() if unit.zone} == {"b"}
    assert answering(world) == 3


def test_a_zone_without_room_has_replicas_wait() -> None:
    one = World(policy(3), setting(zones=(Zone("a", most=2),)))
    one.warm_up()
    run_until(one, 100.0)
    assert answering(one) == 2


def test_a_stalled_replica_is_found_and_started_again() -> None:
    control = ControlSettings(stall_timeout_s=5.0)
    world = begun(Fault(FaultKind.STALL, 30.0, duration_s=1e6, replicas=1), control=control)
    run_until(world, 31.0)
    (still,) = [u for u in world.fleet.units.values() if u.serving and u.serving.paused]
    run_until(world, 40.0)
    assert still.life == 1  # control had it stopped
    run_until(world, 70.0)
    assert still.serving is not None and not still.serving.paused


@pytest.mark.promise(30)
def test_a_preemption_with_notice_is_drained_first() -> None:
    world = begun(Fault(FaultKind.PREEMPTION, 30.0, notice_s=20.0))
    run_until(world, 32.0)
    (leaving,) = [unit for unit in world.fleet.units.values() if unit.draining]
    assert leaving.id not in {one.replica for one in world.state.endpoints}
    assert leaving.life == 0
    run_until(world, 51.0)
    assert leaving.life == 1
    told, untold = (
        simulate(policy(2), setting(faults=(fault,)), arrivals(rate=4.0))
        for fault in (
            Fault(FaultKind.PREEMPTION, 30.0, notice_s=20.0),
            Fault(FaultKind.PREEMPTION, 30.0),
        )
    )
    assert told.resumed == 0 < untold.resumed


def test_a_network_cut_delays_answers_and_is_routed_around() -> None:
    fault = Fault(FaultKind.NETWORK_CUT, 30.0, duration_s=15.0)
    world = begun(fault)
    run_until(world, 40.0)
    (cut,) = [unit for unit in world.fleet.units.values() if unit.cut_until > 40.0]
    assert cut.id not in {one.replica for one in world.state.endpoints}
    result = simulate(policy(), setting(faults=(fault,)), arrivals())
    check_conserved(result)
    assert result.outcomes == {Outcome.FINISHED: result.requests}
    plain = simulate(policy(), setting(), arrivals())
    assert max(result.tpot.percentiles.values()) > max(plain.tpot.percentiles.values())


def test_replicas_that_are_silent_all_at_once_keep_their_endpoints_as_in_production() -> None:
    world = begun(Fault(FaultKind.NETWORK_CUT, 30.0, duration_s=20.0, replicas=3))
    run_until(world, 30.0 + BELIEVED_AFTER_S - 1.0)
    assert len(world.state.endpoints) == answering(world) == 3
    run_until(world, 30.0 + BELIEVED_AFTER_S + 2.0)
    assert world.state.endpoints == ()
    run_until(world, 52.0)
    assert len(world.state.endpoints) == 3


def test_what_is_on_its_way_out_gets_no_endpoint_back_for_its_silence() -> None:
    world = begun(Fault(FaultKind.NETWORK_CUT, 30.0, duration_s=20.0, replicas=3))
    run_until(world, 29.0)
    for unit in list(world.fleet.units.values())[1:]:
        world.fleet.warn(unit, 60.0)
    run_until(world, 33.0)
    assert [one.replica for one in world.state.endpoints] == []


def test_a_silent_replica_is_given_up_after_the_idle_timeout() -> None:
    limits = GatewaySettings(idle_timeout_s=3.0, first_token_timeout_s=4.0)
    fault = Fault(FaultKind.NETWORK_CUT, 30.05, duration_s=50.0, replicas=2)
    result = simulate(policy(), setting(faults=(fault,), gateway=limits), arrivals(rate=9.0))
    check_conserved(result)
    assert result.resumed > 0
    assert result.outcomes == {Outcome.FINISHED: result.requests}


def test_slow_starts_take_longer_for_a_while() -> None:
    slow = Fault(FaultKind.SLOW_START, 0.0, factor=3.0, duration_s=40.0)
    world = begun(slow, Fault(FaultKind.CRASH, 30.0))
    run_until(world, 30.6 + 2 * FIGURES.start_s)
    assert answering(world) == 2
    run_until(world, 31.0 + 3 * FIGURES.start_s)
    assert answering(world) == 3


def reports(world: World) -> list[Demand]:
    return world.state.list_demand()


@pytest.mark.promise(29)
def test_lost_reports_never_arrive_and_nothing_is_scaled_down() -> None:
    scaled = policy(1, max_replicas=8, target_ongoing_requests=1.0)
    world = World(
        scaled, setting(faults=(Fault(FaultKind.REPORTS, 60.0, lost=1.0, duration_s=1e6),))
    )
    world.warm_up()
    world.begin(arrivals(rate=6.0, duration_s=90.0), 10.0)
    run_until(world, 61.0)
    wanted = world.control.wanted
    assert wanted > 1
    (last,) = reports(world)
    run_until(world, 500.0)
    assert reports(world) == [last]
    assert world.control.wanted == wanted  # without data, never down


def test_late_and_doubled_reports_come_again_later() -> None:
    late = begun(Fault(FaultKind.REPORTS, 10.0, late=1.0, delay_s=4.0, duration_s=1e6))
    run_until(late, 30.5)
    (report,) = reports(late)
    assert late.gateways[0].clock.now() - report.measured_at == pytest.approx(4.5, abs=0.6)
    doubled = begun(Fault(FaultKind.REPORTS, 10.0, doubled=1.0, delay_s=4.5, duration_s=1e6))
    run_until(doubled, 30.75)
    (report,) = reports(doubled)
    assert doubled.gateways[0].clock.now() - report.measured_at > 4.0  # an old one stands there


def test_a_gateway_whose_looks_are_lost_goes_by_what_it_saw() -> None:
    lost = Fault(FaultKind.REPORTS, 10.0, lost=1.0, duration_s=20.0)
    world = begun(lost, Fault(FaultKind.CRASH, 20.0))
    (gateway,) = world.gateways
    run_until(world, 29.0)
    assert len(world.state.endpoints) == 2
    assert len(gateway.picture.endpoints) == 3  # it was not told of the crash
    run_until(world, 30.0 + 2 * READ_TIMEOUT_S)
    assert gateway.picture.written == world.state.endpoints


def test_without_control_answers_go_on_and_nothing_changes() -> None:
    fault = Fault(FaultKind.CONTROL_CRASH, 30.0, duration_s=40.0)
    world = begun(fault, Fault(FaultKind.CRASH, 35.0))
    run_until(world, 31.0)
    passes = world.control.passes
    run_until(world, 69.0)
    assert world.control.passes == passes
    run_until(world, 75.0)
    assert world.control.passes > passes
    assert world.control.wanted == 3  # it found what was wanted
    result = simulate(policy(), setting(faults=(fault,)), arrivals())
    assert result.outcomes == {Outcome.FINISHED: result.requests}


def test_while_the_state_is_down_gateways_serve_from_what_they_know() -> None:
    fault = Fault(FaultKind.STATE_DOWN, 30.0, duration_s=40.0)
    world = begun(fault)
    run_until(world, 31.0)
    before = reports(world)
    run_until(world, 69.0)
    assert reports(world) == before
    result = simulate(policy(), setting(faults=(fault,)), arrivals())
    assert result.outcomes == {Outcome.FINISHED: result.requests}


@pytest.mark.promise(29)
@pytest.mark.parametrize("process", ["control", "gateway"])
@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_a_clock_that_jumps_scales_nothing_down(process: str, jump_s: float) -> None:
    jump = Fault(FaultKind.CLOCK_JUMP, 60.0, process=process, jump_s=jump_s, duration_s=1e6)
    world = World(policy(1, max_replicas=8, target_ongoing_requests=1.0), setting(faults=(jump,)))
    world.warm_up()
    world.begin(arrivals(rate=6.0, duration_s=90.0), 10.0)
    run_until(world, 59.0)
    wanted = world.control.wanted
    run_until(world, 85.0)
    assert world.control.wanted >= wanted


# Faults that overlap -----------------------------------------------------------------------------


def overlapping(kind: FaultKind, **more: Any) -> tuple[Fault, Fault]:
    """Two of a kind: from 30 to 50 s, and from 40 to 70 s."""
    return (
        Fault(kind, 30.0, duration_s=20.0, **more),
        Fault(kind, 40.0, duration_s=30.0, **more),
    )


@pytest.mark.parametrize("kind", [FaultKind.STATE_DOWN, FaultKind.CONTROL_CRASH])
def test_what_is_down_twice_is_back_when_both_are_over(kind: FaultKind) -> None:
    world = begun(*overlapping(kind))
    who = world.state if kind is FaultKind.STATE_DOWN else world.control
    for at, down in ((29.0, False), (31.0, True), (51.0, True), (69.0, True), (71.0, False)):
        run_until(world, at)
        assert who.down is down, at


def test_a_zone_that_is_lost_twice_is_back_when_both_losses_are_over() -> None:
    world = begun(*overlapping(FaultKind.ZONE_LOSS, zone="a"))
    run_until(world, 60.0)
    world.fleet.crash(next(iter(world.fleet.units.values())))
    run_until(world, 69.0)
    assert {u.zone.name for u in world.fleet.units.values() if u.zone is not None} == {"b"}


def test_of_reports_that_go_astray_twice_the_worse_counts() -> None:
    first, second = overlapping(FaultKind.REPORTS, lost=1.0)
    world = begun(replace(first, late=0.5, delay_s=2.0), replace(second, lost=0.25, doubled=0.5))
    run_until(world, 45.0)
    assert world.state.trouble == Trouble(lost=1.0, late=0.5, doubled=0.5, delay_s=5.0)
    run_until(world, 51.0)
    assert world.state.trouble == Trouble(lost=0.25, doubled=0.5, delay_s=5.0)
    run_until(world, 71.0)
    assert world.state.trouble == Trouble()


def test_who_stands_still_twice_goes_on_when_both_are_over() -> None:
    patient = ControlSettings(stall_timeout_s=1000.0)
    world = begun(*overlapping(FaultKind.STALL, replicas=3), control=patient)
    for at, still in ((31.0, 3), (51.0, 3), (69.0, 3), (71.0, 0)):
        run_until(world, at)
        standing = [u for u in world.fleet.units.values() if u.serving and u.serving.paused]
        assert len(standing) == still, at


def test_what_died_while_it_stood_still_does_not_go_on() -> None:
    stall = Fault(FaultKind.STALL, 30.0, duration_s=20.0, replicas=3)
    world = begun(stall, Fault(FaultKind.CRASH, 40.0, replicas=3))
    run_until(world, 31.0)
    dead = [unit.serving for unit in world.fleet.units.values() if unit.serving is not None]
    run_until(world, 55.0)
    assert [one.paused for one in dead] == [True] * 3


def test_percentiles_are_by_nearest_rank() -> None:
    spread = spread_of([float(n) for n in range(1, 101)])
    assert (spread.mean, spread[50], spread[99]) == (50.5, 50.0, 99.0)
    assert spread_of([])[99] == 0.0
