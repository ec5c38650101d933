"""What a user may say of placement, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cloudlm.core.errors import InvalidRequest, UnprocessableRequest
from cloudlm.core.figures import ModelFigures
from cloudlm.core.placement import (
    Latency,
    Measured,
    Placement,
    ServiceLevel,
    Spot,
    Traffic,
    Users,
    placement_body,
    placement_from_body,
)

FULL = Placement(
    traffic=Traffic(2.5, 800, 200, 0.25),
    level=ServiceLevel(500.0, 40.0, 0.7),
    spot=Spot(0.5, 2),
    budget_usd_per_h=12.5,
    regions=("eu", "aws/us-east-1"),
    providers=("aws", "gcp"),
    forbidden_providers=("vast",),
    users=(Users(48.1, 11.6, 2.0), Users(-33.9, 151.2)),
    latencies=(Latency("aws/eu-central-1", 12.0),),
    max_latency_ms=120.0,
    min_zones=3,
    max_kinds=1,
    concurrency=8,
    context_tokens=8192,
    figures=ModelFigures(8_000_000_000, 32, 8, 128, 4096, 128_256),
    measured=(Measured("H100-SXM", 2, 20_000.0, 9.0, 0.05),),
)
TRAFFIC = {"requests_per_s": 1, "prompt_tokens": 10, "output_tokens": 20}


def read(body: Any) -> Placement:
    return placement_from_body(json.loads(json.dumps(body)))


def test_it_is_read_back() -> None:
    assert read(placement_body(FULL)) == FULL
    assert read(placement_body(Placement())) == Placement()
    assert read({}) == Placement()


def test_rates_of_tokens_are_requests_with_lengths() -> None:
    rates = {"prefill_tokens_per_s": 3000, "decode_tokens_per_s": 500, "output_tokens": 100}
    assert read({"traffic": rates}).traffic == Traffic(5.0, 600, 100)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], "placement"),
        ({"traffic": {**TRAFFIC, "requests_per_s": 0}}, "placement.traffic.requests_per_s"),
        ({"traffic": {**TRAFFIC, "requests_per_s": True}}, "placement.traffic.requests_per_s"),
        ({"traffic": {**TRAFFIC, "prompt_tokens": 0}}, "placement.traffic.prompt_tokens"),
        ({"traffic": {**TRAFFIC, "output_tokens": 1.5}}, "placement.traffic.output_tokens"),
        ({"traffic": {**TRAFFIC, "cached_share": 1}}, "placement.traffic.cached_share"),
        ({"level": {"ttft_ms": -1}}, "placement.level.ttft_ms"),
        ({"level": {"headroom": 0}}, "placement.level.headroom"),
        ({"spot": {"share": 1.1}}, "placement.spot.share"),
        ({"spot": {"spare": -1}}, "placement.spot.spare"),
        ({"budget_usd_per_h": -1}, "placement.budget_usd_per_h"),
        ({"regions": "eu"}, "placement.regions"),
        ({"regions": [""]}, "placement.regions"),
        ({"providers": [7]}, "placement.providers"),
        ({"users": [{"latitude": 91, "longitude": 0}]}, "placement.users.latitude"),
        ({"users": [{"latitude": 1, "longitude": 0, "share": 0}]}, "placement.users.share"),
        ({"max_latency_ms": 10}, "placement.users"),
        ({"latencies": [{"region": "eu", "ms": -1}]}, "placement.latencies.ms"),
        ({"latencies": [{"ms": 1}]}, "placement.latencies.region"),
        ({"min_zones": 0}, "placement.min_zones"),
        ({"max_kinds": 3}, "placement.max_kinds"),
        ({"providers": ["a"], "forbidden_providers": ["a"]}, "placement.forbidden_providers"),
        ({"figures": {"parameters": 0}}, "placement.figures.parameters"),
        ({"measured": [{"device": "x", "step_ms": 1}]}, "placement.measured.prefill_tokens_per_s"),
        ({"colour": "red"}, "placement.colour"),
        ({"traffic": {**TRAFFIC, "burst": 2}}, "placement.traffic.burst"),
    ],
)
def test_what_is_wrong_is_named(body: Any, param: str) -> None:
    with pytest.raises((InvalidRequest, UnprocessableRequest)) as caught:
        read(body)
    assert caught.value.param == param
