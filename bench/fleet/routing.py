"""Mean time to the first token by routing policy, in the simulator: part of ``make bench-fleet``.

Eight replicas; the recorded conversations at several loads, cache sizes and engines, then drawn
patterns of beginnings, each at two loads and two numbers of slots.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cases import Case, Drawing, mooncake, patterns, policy, setting_of

from cloudlm.core.routing import Policy as Route
from cloudlm.sim.simulation import Result, simulate

COMPARED = (Route.LEAST_COST, Route.ROUND_ROBIN, Route.LEAST_LOAD)
LOADS = ((0.5, False), (0.9, False), (0.8, True))
SLOTS = (64, 8)


@dataclass(frozen=True, slots=True)
class Line:
    """One case under the compared policies, from one seed or several."""

    case: Case
    results: Sequence[dict[Route, Result]]

    def mean(self, route: Route) -> float:
        """Mean seconds to the first token."""
        return sum(one[route].ttft.mean for one in self.results) / len(self.results)

    def times(self, route: Route) -> float:
        """How many times as long another policy takes; above 1 least cost is ahead."""
        return self.mean(route) / self.mean(Route.LEAST_COST)

    @property
    def against_better(self) -> float:
        """Least cost over the better of the other two; the goal is at most 1.02."""
        return 1.0 / min(self.times(route) for route in COMPARED[1:])


def measure(*cases: Case) -> Line:
    """Run a case under all policies; several are the same from other seeds."""
    results = []
    for case in cases:
        setting = setting_of(case)
        results.append({r: simulate(policy(r), setting, case.arrivals()) for r in COMPARED})
    return Line(cases[0], results)


def recorded(traces: Path) -> Iterator[Line]:
    """The Mooncake conversations."""
    whole = mooncake(traces)
    for load in (0.7, 0.9, 1.1):
        yield measure(Case("as recorded", whole, load))
    yield measure(Case("8 slots", whole, 0.9, slots=8))
    yield measure(Case("cache of 2 M tokens", whole, 0.9, cache_tokens=2_000_000))
    yield measure(Case("engine at 4 bits", whole, 0.9, engine="qwen3-0.5b-cpu-int4"))


def drawn(name: str, drawing: Drawing, seeds: int) -> list[Line]:
    """One pattern at all loads and slots."""
    return [
        measure(*(Case(name, drawing(seed), load, slots, useful=u) for seed in range(seeds)))
        for load, u in LOADS
        for slots in SLOTS
    ]


def section(asked: Namespace) -> str:
    """The text for RESULTS.md."""
    parts = [
        "## Routing: `make bench-fleet` (simulated)\n",
        "Mean time to the first token with 8 replicas of 64 slots and a cache of 500,000 tokens, "
        "all in the simulator; the replicas' figures are those measured of the engine at 16 bits, "
        "on machines so much faster that they would compute for the stated share of the time "
        "(load) if no cache ever helped; with *useful load* only what a cache can never save "
        "counts. Ratios above 1 mean that least cost is ahead.\n",
        "**Mooncake conversations** (12,031 requests of one hour, of 12,000 tokens in the mean)\n",
        "| case | load | least cost s | round robin s | least load s | ÷ round robin | ÷ least load"
        " | cached %: least cost, round robin, least load |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(_row(line) for line in recorded(asked.traces)),
        "\n**Drawn patterns**, each at loads 0.5 and 0.9 and useful load 0.8, with 64 and 8 slots, "
        f"{asked.requests:,} requests from each of {asked.seeds} seeds\n",
        "| beginnings | ÷ round robin | ÷ least load | worst against the better of the two |",
        "|---|--:|--:|--:|",
    ]
    worst = 0.0
    for name, drawing in patterns(asked.requests).items():
        lines = drawn(name, drawing, asked.seeds)
        against = max(lines, key=lambda line: line.against_better)
        worst = max(worst, against.against_better)
        kind = "useful load" if against.case.useful else "load"
        where = f"{kind} {against.case.load:g}, {against.case.slots} slots"
        robin, least = (_geometric([line.times(r) for line in lines]) for r in COMPARED[1:])
        parts.append(
            f"| {name} | {robin:.2f} | {least:.2f} | {against.against_better:.3f} ({where}) |"
        )
    parts.append(f"\nWorst of all: {worst:.3f} (goal: at most 1.02).")
    return "\n".join(parts)


def _row(line: Line) -> str:
    case, results = line.case, line.results[0]
    means = " | ".join(f"{line.mean(route):.2f}" for route in COMPARED)
    times = " | ".join(f"**{line.times(route):.2f}**" for route in COMPARED[1:])
    hits = ", ".join(f"{100 * results[route].cache_hits:.0f}" for route in COMPARED)
    return f"| {case.name} | {case.load:g} | {means} | {times} | {hits} |"


def _geometric(values: Sequence[float]) -> float:
    product = 1.0
    for value in values:
        product *= value
    return product ** (1 / len(values))
