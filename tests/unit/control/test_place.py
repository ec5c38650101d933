"""Placement: the cheapest choice is found, every bound holds, and what lost says why."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.control.catalogue.words import Catalogue, Device, Kind, Offer, Region
from cloudlm.control.needs import Batch
from cloudlm.control.offers import Asked, Lost, Machine, Reason, distance_km, in_area, judge
from cloudlm.control.place import place, usd_per_million_tokens
from cloudlm.core.figures import ModelFigures
from cloudlm.core.placement import (
    Latency,
    Measured,
    Placement,
    ServiceLevel,
    Spot,
    Traffic,
    Users,
)

FIGURES = ModelFigures(
    parameters=8_000_000_000,
    layers=32,
    kv_heads=8,
    head_dim=128,
    hidden_size=4096,
    vocab_size=128_256,
    widest=28_672,
)
DEVICES = {
    "big": Device("big", Kind.GPU, 80, 3000, 900),
    "mid": Device("mid", Kind.GPU, 48, 900, 300),
    "small": Device("small", Kind.GPU, 16, 300, 65),
    "mute": Device("mute", Kind.GPU, 80, 0, 0),
    "core": Device("core", Kind.CPU, 0, 3.6, 0.28),
}
REGIONS = {
    "aws/eu-central-1": Region("aws", "eu-central-1", "eu/de", 50.1, 8.7),
    "aws/us-east-1": Region("aws", "us-east-1", "us", 39.0, -77.1),
    "gcp/europe-west4": Region("gcp", "europe-west4", "eu/nl", 53.4, 6.8),
}
MUNICH = Users(48.14, 11.58)


def offer(
    device: str = "big",
    price: float | None = 2.0,
    *,
    place_: str = "aws/eu-central-1",
    name: str = "m",
    count: int = 1,
    spot: dict[str, float] | None = None,
) -> Offer:
    provider, region = place_.split("/")
    return Offer(provider, name, device, count, region, price, spot or {}, ram_gib=256)


def market(*offers: Offer) -> Catalogue:
    return Catalogue(DEVICES, offers, REGIONS)


def asked(rate: float = 1.0, min_replicas: int = 0, **wishes: object) -> Asked:
    placement = Placement(**wishes)  # type: ignore[arg-type]
    return Asked(FIGURES, placement, Traffic(rate, 1000, 200), Batch(2048, 256), min_replicas)


def reason_of(one: Offer, **wishes: object) -> Reason:
    found = judge(one, market(one), asked(**wishes))
    assert isinstance(found, Lost), found
    assert found.detail
    return found.reason


class TestJudge:
    def test_each_bound_says_why(self) -> None:
        assert reason_of(offer(), providers=("gcp",)) is Reason.PROVIDER
        assert reason_of(offer(), forbidden_providers=("aws",)) is Reason.PROVIDER
        assert reason_of(offer(), regions=("us",)) is Reason.REGION
        assert reason_of(offer(place_="vast/any"), regions=("eu",)) is Reason.REGION
        assert reason_of(offer(price=None, spot={"a": 1.0})) is Reason.SPOT_ONLY
        assert reason_of(offer("small")) is Reason.MEMORY
        assert reason_of(offer("mute")) is Reason.UNKNOWN
        assert reason_of(offer("mid"), level=ServiceLevel(tpot_ms=10)) is Reason.SLOW
        assert reason_of(offer("mid"), level=ServiceLevel(ttft_ms=20)) is Reason.SLOW
        far = offer(place_="aws/us-east-1")
        assert reason_of(far, users=(MUNICH,), max_latency_ms=60.0) is Reason.LATENCY
        nowhere = offer(place_="vast/any")
        assert reason_of(nowhere, users=(MUNICH,), max_latency_ms=60.0) is Reason.LATENCY

    def test_a_version_that_fits_no_device_takes_several(self) -> None:
        found = judge(offer("small", count=4), market(), asked())
        assert isinstance(found, Machine)
        assert found.pieces > 1
        assert found.pieces * found.replicas == 4

    def test_a_machine_is_cut_into_as_many_replicas_as_bear_most(self) -> None:
        found = judge(offer(count=8), market(), asked())
        assert isinstance(found, Machine)
        assert (found.pieces, found.replicas) == (1, 8)

    def test_more_sequences_need_more_memory(self) -> None:
        assert reason_of(offer("mid"), concurrency=200) is Reason.MEMORY
        assert reason_of(offer("mid"), context_tokens=1_000_000) is Reason.MEMORY

    def test_what_was_measured_counts_before_the_estimate(self) -> None:
        measured = Measured("mute", 1, 20_000, 12.0, 0.1)
        found = judge(offer("mute"), market(), asked(measured=(measured,)))
        assert isinstance(found, Machine)
        assert not found.estimated

    def test_the_distance_to_the_users_counts_in_the_first_token(self) -> None:
        near = judge(offer(), market(), asked(users=(MUNICH,)))
        far = judge(offer(place_="aws/us-east-1"), market(), asked(users=(MUNICH,)))
        assert isinstance(near, Machine)
        assert isinstance(far, Machine)
        assert far.at_limit.ttft_ms - near.at_limit.ttft_ms == pytest.approx(
            far.network_ms - near.network_ms
        )
        assert far.network_ms > 90

    def test_a_measured_latency_counts_before_the_distance(self) -> None:
        known = (Latency("aws/us-east-1", 20.0), Latency("us", 90.0))
        far = offer(place_="aws/us-east-1")
        found = judge(far, market(), asked(users=(MUNICH,), latencies=known, max_latency_ms=30.0))
        assert isinstance(found, Machine)
        assert found.network_ms == 20.0
        assert reason_of(far, latencies=known[1:], max_latency_ms=30.0) is Reason.LATENCY

    @pytest.mark.parametrize(
        ("wanted", "inside"),
        [
            ("eu", True),
            ("EU", True),
            ("eu/de", True),
            ("eu-central-1", True),
            ("aws/eu-central-1", True),
            ("gcp/eu-central-1", False),
            ("eu/d", False),
            ("e", False),
        ],
    )
    def test_areas(self, wanted: str, inside: bool) -> None:
        assert in_area(offer(), REGIONS["aws/eu-central-1"], wanted) is inside

    def test_distances_are_those_of_an_atlas(self) -> None:
        km = distance_km(REGIONS["aws/eu-central-1"], MUNICH)
        assert km is not None
        assert 290 < km < 320  # Frankfurt to Munich: 304 km
        assert distance_km(Region("a", "b", "c"), MUNICH) is None


class TestPlace:
    def test_the_cheapest_comes_first_and_bears_the_load(self) -> None:
        cheap, dear = offer(price=2.0, name="cheap"), offer(price=3.0, name="dear")
        found = place(asked(rate=20.0), market(dear, cheap))
        assert found.best is not None
        assert found.best.parts[0].machine.offer is cheap
        assert found.best.requests_per_s >= 20.0
        assert [one.usd_per_h for one in found.choices] == sorted(
            one.usd_per_h for one in found.choices
        )

    def test_a_mix_is_taken_where_it_is_cheaper(self) -> None:
        big, mid = offer(price=4.0, name="big"), offer("mid", name="mid")
        one, other = judge(big, market(), asked()), judge(mid, market(), asked())
        assert isinstance(one, Machine)
        assert isinstance(other, Machine)
        mid = replace(mid, on_demand=1.3 * 4.0 * other.requests_per_s / one.requests_per_s)
        found = place(asked(rate=one.requests_per_s * 1.05), market(big, mid))
        assert found.best is not None
        assert len(found.best.parts) == 2
        alone = place(asked(rate=one.requests_per_s * 1.05, max_kinds=1), market(big, mid))
        assert alone.best is not None
        assert alone.best.usd_per_h > found.best.usd_per_h

    @given(
        st.lists(
            st.tuples(st.sampled_from(["big", "mid"]), st.floats(0.5, 9), st.sampled_from([1, 2])),
            min_size=1,
            max_size=3,
        ),
        st.floats(0.5, 60.0),
    )
    @settings(max_examples=60, deadline=None)
    def test_no_mix_of_two_is_cheaper(
        self, rows: list[tuple[str, float, int]], rate: float
    ) -> None:
        offers = [
            offer(device, price, name=str(number), count=count)
            for number, (device, price, count) in enumerate(rows)
        ]
        wishes = asked(rate=rate)
        found = place(wishes, market(*offers)).best
        assert found is not None
        machines = [judge(one, market(), wishes) for one in offers]
        held = [one for one in machines if isinstance(one, Machine)]
        most = [math.ceil(rate / one.requests_per_s) for one in held]
        cheapest = math.inf
        for first, second in itertools.product(range(len(held)), repeat=2):
            for few in range(most[first] + 1):
                rest = rate - few * held[first].requests_per_s
                many = max(0, math.ceil(rest / held[second].requests_per_s - 1e-9))
                cost = few * (offers[first].on_demand or 0) + many * (offers[second].on_demand or 0)
                cheapest = min(cheapest, cost)
        assert found.usd_per_h == pytest.approx(cheapest)
        assert found.usd_per_h >= place(wishes, market(*offers)).usd_per_h_at_least - 1e-9

    @given(
        rate=st.floats(0.2, 80.0),
        share=st.floats(0, 1),
        zones=st.integers(1, 3),
        least=st.integers(0, 6),
        spot=st.lists(st.floats(0.1, 4.0), min_size=0, max_size=4),
    )
    @settings(max_examples=120, deadline=None)
    def test_every_bound_holds(
        self, rate: float, share: float, zones: int, least: int, spot: list[float]
    ) -> None:
        here = offer(price=3.0, name="here", spot={f"z{i}": usd for i, usd in enumerate(spot)})
        there = offer("mid", 1.0, place_="gcp/europe-west4", name="there")
        wishes = asked(rate, least, spot=Spot(share), min_zones=zones, budget_usd_per_h=60.0)
        found = place(wishes, market(here, there))
        for choice in found.choices:
            assert choice.requests_per_s >= rate - 1e-6
            assert choice.usd_per_h <= 60.0
            assert choice.usd_per_h <= choice.usd_per_h_at_most + 1e-9
            assert choice.usd_per_h >= found.usd_per_h_at_least - 1e-9
            assert choice.zones >= zones
            assert choice.replicas >= least
            for part in choice.parts:
                on_demand = sum(part.on_demand.values())
                on_spot = part.count - on_demand
                assert on_spot <= share * part.count + 1e-6
                if on_spot:
                    assert sum(part.spot.values()) == on_spot + 1
                price = part.machine.offer.on_demand or 0.0
                usd = on_demand * price
                usd += sum(part.machine.offer.spot[z] * n for z, n in part.spot.items())
                assert part.usd_per_h == pytest.approx(usd)

    def test_bounds_on_the_whole_say_why_they_lose(self) -> None:
        found = place(asked(rate=20.0, budget_usd_per_h=1.0), market(offer()))
        assert found.best is None
        assert [one.reason for one in found.lost] == [Reason.BUDGET]
        found = place(asked(min_zones=2), market(offer()))
        assert [one.reason for one in found.lost] == [Reason.ZONES]

    def test_zones_may_be_of_two_regions(self) -> None:
        here, there = offer(), offer(place_="gcp/europe-west4")
        found = place(asked(min_zones=2), market(here, there))
        assert found.best is not None
        assert found.best.zones == 2

    def test_spot_is_spread_and_backed(self) -> None:
        spot = {"a": 0.5, "b": 0.6, "c": 0.7, "dear": 5.0}
        found = place(asked(rate=80.0, spot=Spot(0.5, 1)), market(offer(price=2.0, spot=spot)))
        assert found.best is not None
        (part,) = found.best.parts
        assert "dear" not in part.spot
        assert len(part.spot) >= 2
        assert sum(part.on_demand.values()) >= part.count / 2
        assert found.best.usd_per_h < found.best.usd_per_h_at_most == 2.0 * part.count

    def test_a_million_tokens(self) -> None:
        wishes = asked(rate=1.0)  # 1200 tokens a second: 4.32 million an hour
        assert usd_per_million_tokens(4.32, wishes) == pytest.approx(1.0)

    def test_more_load_never_costs_less_than_the_bound(self) -> None:
        offers = market(offer(), replace(offer("mid", 1.0), instance="n"))
        costs = [place(asked(rate=rate), offers).best for rate in (1.0, 10.0, 100.0)]
        bound = [place(asked(rate=rate), offers).usd_per_h_at_least for rate in (1.0, 10.0, 100.0)]
        for choice, least in zip(costs, bound, strict=True):
            assert choice is not None
            assert choice.usd_per_h >= least
