"""Trust: ejection, half-open probes, panic; against Envoy's rules as the oracle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.deployment import Endpoint
from cloudlm.core.routing import Policy
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.router import available, choose, eligible, in_panic


def endpoints(count: int) -> list[Endpoint]:
    return [Endpoint("m", f"r{n}", f"http://h:{n}", 1) for n in range(count)]


def names(found: list[Endpoint]) -> list[str]:
    return [one.replica for one in found]


@pytest.mark.promise(27)
def test_one_request_at_a_time_finds_out_whether_a_replica_is_well() -> None:
    serving, loads = endpoints(2), Loads()
    loads.failed("r0", 0.0)
    assert names(eligible(serving, loads, 0.5)) == ["r1"]
    assert names(eligible(serving, loads, 1.0)) == ["r0", "r1"]  # half-open
    probe = loads.begin("r0", now=1.0)
    assert names(eligible(serving, loads, 1.1)) == ["r1"]  # somebody finds out
    loads.end("r0", probe)  # without a verdict: the client went away
    assert names(eligible(serving, loads, 1.2)) == ["r0", "r1"]
    loads.begin("r0", now=1.2)
    loads.answered("r0")
    assert names(eligible(serving, loads, 1.3)) == ["r0", "r1"]
    loads.begin("r0", now=1.3)
    assert names(eligible(serving, loads, 1.4)) == ["r0", "r1"]  # trusted: many at once


@pytest.mark.promise(27)
def test_a_failed_probe_ejects_for_longer() -> None:
    serving, loads = endpoints(2), Loads()
    loads.failed("r0", 0.0)
    probe = loads.begin("r0", now=1.0)
    loads.failed("r0", 1.5)
    loads.end("r0", probe)
    assert names(eligible(serving, loads, 3.4)) == ["r1"]
    assert names(eligible(serving, loads, 3.5)) == ["r0", "r1"]


def test_an_old_request_ends_no_probe_but_its_own() -> None:
    serving, loads = endpoints(2), Loads()
    old = loads.begin("r0", now=0.0)
    loads.failed("r0", 0.0)
    probe = loads.begin("r0", now=1.0)
    loads.end("r0", old)
    assert names(eligible(serving, loads, 1.1)) == ["r1"]
    loads.end("r0", probe)
    assert names(eligible(serving, loads, 1.1)) == ["r0", "r1"]


@pytest.mark.promise(28)
@pytest.mark.known_failure("litellm#40130")
def test_a_later_failure_never_shortens_distrust() -> None:
    loads = Loads()
    for _ in range(5):
        loads.failed("r0", 10.0)
    until = loads.of("r0").suspect_until
    loads.failed("r0", 0.0)
    assert loads.of("r0").suspect_until == until


@pytest.mark.promise(28)
@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.sampled_from(["failed", "asked"]), st.floats(0, 120)),
        min_size=1,
        max_size=30,
    )
)
def test_the_later_end_holds_from_the_next_choice_on(
    events: list[tuple[float, str, float]],
) -> None:
    """Failures and wishes for time in any order: no end ever moves back, what was asked for is
    kept in full, and the replica is not chosen while another one is well."""
    loads, now, wished = Loads(), 0.0, float("-inf")
    for pause_s, kind, wait_s in events:
        now += pause_s
        before = loads.of("r0")
        ends = before.cooling_until, before.suspect_until
        if kind == "asked":
            loads.cool("r0", now + wait_s)
            wished = max(wished, now + wait_s)
        else:
            loads.failed("r0", now)
        after = loads.of("r0")
        assert after.cooling_until == wished
        assert (after.cooling_until, after.suspect_until) >= ends
        assert after.suspect_until >= ends[1]
        end = max(after.cooling_until, after.suspect_until)
        if now < end:
            assert names(eligible(endpoints(2), loads, now)) == ["r1"]


@pytest.mark.promise(27)
@given(st.integers(1, 8), st.data())
def test_panic_is_more_than_half(count: int, data: st.DataObject) -> None:
    """Envoy: below 50 % healthy, health is ignored and all hosts are used."""
    serving, loads = endpoints(count), Loads()
    ejected = data.draw(st.integers(0, count))
    for one in serving[:ejected]:
        loads.failed(one.replica, 0.0)
    panic = ejected * 2 > count
    assert in_panic(serving, loads, 0.5) is panic
    wanted = serving if panic or not ejected else serving[ejected:]
    assert eligible(serving, loads, 0.5) == wanted
    assert available(serving, loads, 0.5) == count - ejected


@pytest.mark.promise(27)
def test_in_panic_every_policy_spreads_over_all() -> None:
    for policy in Policy:
        serving, loads = endpoints(4), Loads()
        for one in serving[:3]:
            loads.failed(one.replica, 0.0)
        seen = set()
        for number in range(40):
            found = choose(
                serving,
                loads,
                0.5,
                policy=policy,
                draws=(number / 40, number * 7 % 40 / 40),
                session=bytes([number]) * 16,
            )
            assert found is not None
            loads.begin(found.replica)
            seen.add(found.replica)
        assert len(seen) == 4, policy


@pytest.mark.promise(27)
def test_replicas_that_are_not_there_cause_no_panic() -> None:
    """Two of three processes died: the third gets everything, for nobody else can answer."""
    serving, loads = endpoints(3), Loads()
    for one in serving[:2]:
        loads.failed(one.replica, 0.0, unreachable=True)
    assert not in_panic(serving, loads, 0.5)
    assert names(eligible(serving, loads, 0.5)) == ["r2"]
    loads.failed("r2", 0.5)
    assert in_panic(serving, loads, 0.6)  # of those that are there, all failed
    assert names(eligible(serving, loads, 0.6)) == ["r2"]
    loads.failed("r2", 0.6, unreachable=True)
    assert names(eligible(serving, loads, 0.7)) == ["r0", "r1", "r2"]  # in need, any


@pytest.mark.promise(28)
def test_one_who_asked_for_time_gets_it_in_panic_too() -> None:
    serving, loads = endpoints(3), Loads()
    for one in serving[:2]:
        loads.failed(one.replica, 0.0)
    loads.cool("r0", until=10.0)
    assert names(eligible(serving, loads, 0.5)) == ["r1", "r2"]
    assert names(eligible(serving, loads, 0.5, tried={"r1", "r2"}, retrying=True)) == []


@pytest.mark.promise(27)
@given(
    st.integers(1, 5),
    st.lists(
        st.tuples(
            st.sampled_from(["fail", "gone", "cool", "answer", "go", "end"]), st.integers(0, 4)
        ),
        max_size=60,
    ),
)
def test_somebody_is_always_left_and_probes_are_single(
    count: int, steps: list[tuple[str, int]]
) -> None:
    """Whatever happened, a first attempt has somewhere to go; outside of panic and need a
    half-open replica has one request of after its failure at most."""
    serving, loads, now = endpoints(count), Loads(), 0.0
    running: list[tuple[str, object]] = []
    for step, number in steps:
        now += 0.4
        replica = f"r{number % count}"
        if step in ("fail", "gone"):
            loads.failed(replica, now, unreachable=step == "gone")
        elif step == "cool":
            loads.cool(replica, now + 1.0)
        elif step == "answer":
            loads.answered(replica)
        elif step == "end" and running:
            loads.end(*running.pop(0))  # type: ignore[arg-type]
        elif step == "go":
            found = eligible(serving, loads, now)
            assert found
            probing = [one for one in found if loads.of(one.replica).probe]
            in_need = available(serving, loads, now) == 0
            assert not probing or in_need or in_panic(serving, loads, now)
            running.append((found[0].replica, loads.begin(found[0].replica, now=now)))
    assert eligible(serving, loads, now)
