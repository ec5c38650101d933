"""Scenarios: what is wrong with one is named; the page stands alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.routing import Policy as Route
from cloudlm.core.tenant import Outcome as End
from cloudlm.sim.faults import FaultKind
from cloudlm.sim.page import STYLES, page
from cloudlm.sim.plots import MOST_POINTS, clock, factors, linear, thinned
from cloudlm.sim.scenario import Scenario, read_scenario
from cloudlm.sim.simulation import simulate

ROOT = Path(__file__).parents[3]
SMALL = {
    "traffic": {"source": "poisson", "rate": 2, "duration_s": 30, "output": {"tokens": 20}},
    "replica": {"speed": 20, "slots": 4, "start_s": 5},
    "policies": [
        {"name": "one", "deployment": {"routing": {"policy": "round_robin"}}},
        {"name": "two", "autoscaler": "fixed", "deployment": {"max_replicas": 2}},
    ],
}


PLACED = {
    "deployment": {
        "placement": {
            "traffic": {"requests_per_s": 2, "prompt_tokens": 200, "output_tokens": 20},
            "regions": ["aws/us-east-2"],
            "figures": {
                "parameters": 10**9,
                "layers": 16,
                "kv_heads": 8,
                "head_dim": 128,
                "hidden_size": 2048,
                "vocab_size": 32_000,
            },
        }
    },
    "policies": [
        {"name": "dear", "placement": "catalogue"},
        {
            "name": "spot",
            "placement": "catalogue",
            "deployment": {"placement": {"spot": {"share": 1}, "min_zones": 2}},
        },
    ],
}


def scenario(folder: Path, **more: Any) -> Scenario:
    path = folder / "scenario.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **more}))
    return read_scenario(path)


def test_a_scenario_is_read(tmp_path: Path) -> None:
    found = scenario(
        tmp_path,
        seed=9,
        begin_with=2,
        gateway={"queue_timeout_s": 3, "replica_capacity": 8},
        zones=[{"name": "z", "price_per_hour": 3, "most": 4}],
        faults=[{"at": 3, "kind": "zone_loss", "zone": "z"}],
        faults_per_hour={"crash": 600},
        service_level={"ttft_s": 0.5},
    )
    assert found.setting.gateway.queue_timeout_s == 3.0
    assert found.setting.gateway.replica_capacity == 8
    assert found.setting.figures.slots == 4
    assert {one.kind for one in found.setting.faults} == {FaultKind.ZONE_LOSS, FaultKind.CRASH}
    assert [one.autoscaler for one in found.policies] == ["tokens", "fixed"]
    assert found.setting.begin_with == 2
    assert found.policies[0].spec.routing.policy is Route.ROUND_ROBIN
    assert list(found.arrivals()) == list(found.arrivals())
    assert [one.at for one in found.setting.faults] == sorted(
        one.at for one in found.setting.faults
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"traffic": {"source": "radio"}}, "traffic.source 'radio' is unknown; there are azure"),
        ({"traffic": {"source": "azure"}}, "traffic.file"),
        ({"traffic": {"source": "poisson"}}, "traffic.rate"),
        ({"traffic": {"source": "poisson", "rate": 1, "cv": 2}}, "no field 'traffic.cv'"),
        ({"replica": {"figures": "x"}}, "replica.figures 'x' is unknown; there are qwen3"),
        ({"policies": []}, "at least one"),
        ({"policies": [{"name": "a"}, {"name": "a"}]}, "its own name"),
        ({"policies": [{"name": "a", "autoscaler": "x"}]}, "autoscaler 'x' is unknown"),
        (
            {
                "policies": [
                    {
                        "name": "a",
                        "autoscaler": "hpa",
                        "deployment": {"scaling": {"algorithm": "kpa"}},
                    }
                ]
            },
            "has autoscaler hpa and scaling.algorithm kpa",
        ),
        (
            {
                "deployment": {"scaling": {"target_ttft_ms": 9}},
                "policies": [{"name": "a", "autoscaler": "kpa"}],
            },
            "kpa follows requests at once alone",
        ),
        ({"policies": [{"name": "a", "deployment": {"max_replicas": 0}}]}, "max_replicas"),
        ({"faults": [{"kind": "crash"}]}, "faults.at"),
        ({"faults": [{"kind": "flood", "at": 1}]}, "must be one of crash, stall"),
        ({"faults": [{"kind": "zone_loss", "at": 1, "zone": "b"}]}, "names the zone 'b'"),
        ({"faults": [{"kind": "crash", "at": 1, "what": 2}]}, "no field 'faults.what'"),
        ({"rollouts": [{"name": "B"}]}, "rollouts.at"),
        ({"rollouts": [{"at": 1, "error_rate": 2}]}, "rollouts.error_rate"),
        ({"rollouts": [{"at": 1, "replica": {"pace": 2}}]}, "no field 'replica.pace'"),
        ({"rollouts": [{"at": 1, "what": 2}]}, "no field 'rollouts.what'"),
        ({"rollouts": [{"at": 1, "model": "a"}, {"at": 2, "model": "a"}]}, "is named twice"),
        ({"rollouts": [{"at": n} for n in range(51)]}, "rollouts may be 50 at most"),
        ({"gateway": {"port": "x"}}, "gateway.port"),
        ({"gateway": {"host": "x"}}, "makes no difference"),
        ({"zones": []}, "at least one"),
        (
            {"policies": [{"name": "a", "placement": "cheapest"}]},
            "placement 'cheapest' is unknown; there are spread, catalogue",
        ),
        (
            {"policies": [{"name": "a", "placement": "catalogue"}]},
            "placement: catalogue: simulated: placement.traffic is missing",
        ),
        (
            {**PLACED, "faults": [{"kind": "no_spot", "at": 1, "zone": "zone"}]},
            "names the zone 'zone'; the fleet has aws/us-east-2/use2-az1",
        ),
        ({**PLACED, "catalogue": "none"}, "none is no folder"),
        ({"weather": 1}, "no field 'weather'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, more: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(says)):
        scenario(tmp_path, **more)


def test_a_policys_wishes_go_over_the_common_ones_one_by_one(tmp_path: Path) -> None:
    fault = {"kind": "no_spot", "at": 5, "zone": "aws/us-east-2/use2-az1"}
    found = scenario(tmp_path, **PLACED, faults=[fault])
    dear, spot = (one.placed for one in found.policies)
    assert dear is not None
    assert spot is not None
    assert not any(part.spot for part in dear.choice.parts)
    assert spot.rules.share == 1.0
    assert spot.choice.parts[0].machine.offer.region == "us-east-2"
    results = [simulate(one, found.setting, found.arrivals()) for one in found.policies]
    assert all(one.open == 0 for one in results)
    assert [one.rent is not None and one.rent.spot_h > 0 for one in results] == [False, True]


def test_versions_are_read_and_each_policy_may_have_its_own(tmp_path: Path) -> None:
    entry = {"at": 9, "name": "B", "error_rate": 0.1, "replica": {"start_s": 7}, "starts": False}
    own = {"name": "three", "rollouts": []}
    policies = [*SMALL["policies"], own]  # type: ignore[misc]
    found = scenario(tmp_path, rollouts=[entry, {"at": 4}], policies=policies)
    first, second = found.policies[0].releases
    assert found.policies[1].releases == (first, second)
    assert found.policies[2].releases == ()
    assert (first.at, first.name, first.version.model) == (4.0, "version 3", "models:/simulated/3")
    assert first.version.figures == found.setting.figures
    assert (second.at, second.name, second.version.error_rate) == (9.0, "B", 0.1)
    assert second.version.figures.start_s == 7.0
    assert second.version.figures.step == found.setting.figures.step  # the scenario's speed
    assert not second.version.starts


def test_the_example_of_a_bad_version_is_rolled_back() -> None:
    found = read_scenario(ROOT / "examples/scenarios/rollout.yaml")
    results = {one.name: simulate(one, found.setting, found.arrivals()) for one in found.policies}
    fates = {name: one.rollouts[0].outcome.value for name, one in results.items()}
    back = "rolled_back"
    assert fates == {"rolling": "promoted", "blue-green": back, "canary": back, "mirror": back}
    canary, rolling = results["canary"], results["rolling"]
    assert canary.outcomes == {End.FINISHED: canary.requests}
    assert canary.rollouts[0].unanswered == 0
    assert rolling.outcomes[End.FAILED] > 0
    text = page("x", [], list(results.values()))
    reader = _Page()
    reader.feed(text)
    assert reader.open == []
    assert "canary: B" in text
    assert "Requests to the new version" in text


def test_what_is_no_scenario_is_named(tmp_path: Path) -> None:
    for text, says in (
        ("a: [", "no YAML"),
        ("a: 2024-02-30", "no YAML"),
        ("[1]", "must be a JSON object"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(InvalidRequest, match=says):
            read_scenario(path)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_scenario(tmp_path / "nowhere.yaml")


class _Page(HTMLParser):
    """Checks that elements are closed in order and notes what is referred to."""

    VOID = ("meta", "line", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(tmp_path: Path) -> None:
    found = scenario(tmp_path)
    results = [simulate(one, found.setting, found.arrivals()) for one in found.policies]
    text = page("<script>alert(1)</script>", ["a & b"], results)
    reader = _Page()
    reader.feed(text)
    assert reader.open == []
    assert reader.references == []
    assert "script" not in reader.elements
    assert reader.elements.count("svg") == 4
    assert "url(" not in text and "@import" not in text
    assert "prefers-color-scheme:dark" in text
    for result in results:
        assert text.count(f"<title>{result.policy}</title>") == 3  # a line in three of the plots
    assert f"{results[0].requests:,}" in text


def test_many_policies_are_told_apart(tmp_path: Path) -> None:
    found = scenario(tmp_path)
    result = simulate(found.policies[0], found.setting, found.arrivals())
    text = page("many", [], [result] * (STYLES + 2))
    assert "stroke-dasharray" in text


def test_axes_have_round_ticks() -> None:
    assert [text for _, text in linear(93.0).ticks] == ["0", "25", "50", "75", "100"]
    assert linear(0.0).high > 0
    assert clock(3600.0).ticks[-1][1].endswith("min")
    assert [text for _, text in factors(0.04, 30.0).ticks] == [
        "10 ms",
        "100 ms",
        "1 s",
        "10 s",
        "100 s",
    ]


def test_thinning_keeps_peaks() -> None:
    points = [(float(n), 100.0 if n == 777 else 1.0) for n in range(5000)]
    found = thinned(points)
    assert len(found) <= MOST_POINTS
    assert max(value for _, value in found) == 100.0


OTHERS = [
    path
    for path in sorted((ROOT / "examples/scenarios").glob("*.yaml"))
    if path.stem != "rollout"  # has a test of its own
]


@pytest.mark.parametrize("path", OTHERS)
def test_the_examples_run(path: Path) -> None:
    found = read_scenario(path)
    for one in found.policies:
        result = simulate(one, found.setting, found.arrivals())
        assert result.requests > 100
        assert result.open == 0
