"""How policies did, as rows of a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cloudlm.core.tenant import Outcome
from cloudlm.sim.measure import PERCENTILES, Spread
from cloudlm.sim.report_machines import machines_body
from cloudlm.sim.report_rollouts import rollout_body
from cloudlm.sim.simulation import Result

COLUMNS = (
    "POLICY",
    "REQUESTS",
    "NOT ANSWERED",
    "TTFT MEAN",
    "P50",
    "P99 S",
    "TPOT P50",
    "P99 MS",
    "QUEUE P99 S",
    "LATE",
    "VIOLATIONS",
    "CACHED",
    "REPLICA-HOURS",
    "MOST",
    "COST",
    "PER MTOK",
)

MEASURES = (
    "requests",
    "not answered",
    "TTFT mean, s",
    "TTFT p50, s",
    "TTFT p99, s",
    "TPOT p50, ms",
    "TPOT p99, ms",
    "queue p99, s",
    "late, %",
    "violations, %",
    "cached, %",
    "replica-hours",
    "most replicas",
    "cost",
    "cost per million tokens",
)
"""The columns after the first with their units, as names of rows."""


def measured_rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """A row per measure: its name, and each policy's number."""
    numbers = zip(*(table_row(result)[1:] for result in results), strict=True)
    return [
        (name, *(number.removesuffix(" %") for number in row))
        for name, row in zip(MEASURES, numbers, strict=True)
    ]


def table_row(result: Result) -> tuple[str, ...]:
    """One policy under ``COLUMNS``."""
    ttft, tpot = result.ttft, result.tpot
    lost = result.requests - result.outcomes.get(Outcome.FINISHED, 0)
    return (
        result.policy,
        f"{result.requests:,}",
        f"{lost:,}",
        seconds(ttft.mean),
        seconds(ttft[50]),
        seconds(ttft[99]),
        f"{tpot[50] * 1000:.0f}",
        f"{tpot[99] * 1000:.0f}",
        seconds(result.queue[99]),
        share(result.late),
        share(result.violations),
        share(result.cache_hits),
        f"{result.replica_hours:.2f}",
        str(result.most_replicas),
        f"{result.cost:.2f}",
        f"{per_million(result):.2f}",
    )


def per_million(result: Result) -> float:
    """What a million tokens of answers cost."""
    return result.cost / result.output_tokens * 1e6 if result.output_tokens else 0.0


def share(value: float) -> str:
    """A share as people read it."""
    return f"{100 * value:.1f} %"


def seconds(value: float) -> str:
    """Seconds with as many digits as say something."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def result_body(result: Result) -> dict[str, Any]:
    """A result as JSON: sums, spreads and the fleet over time; single requests are left out."""
    return {
        "policy": result.policy,
        "requests": result.requests,
        "outcomes": {kind.value: count for kind, count in result.outcomes.items()},
        "open": result.open,
        "attempts": result.attempts,
        "retried": result.retried,
        "resumed": result.resumed,
        "ttft_s": _spread_body(result.ttft),
        "tpot_s": _spread_body(result.tpot),
        "queue_s": _spread_body(result.queue),
        "late_share": result.late,
        "violation_share": result.violations,
        "cache_hit_share": result.cache_hits,
        "replica_hours": result.replica_hours,
        "most_replicas": result.most_replicas,
        "cost": result.cost,
        "cost_per_million_tokens": per_million(result),
        "output_tokens": result.output_tokens,
        "faults": result.faults,
        "ended_at_s": result.ended_at,
        "machines": machines_body(result),
        "rollouts": [rollout_body(one) for one in result.rollouts],
        "moments": [asdict(one) for one in result.moments],
    }


def report_body(name: str, seed: int, results: Sequence[Result]) -> dict[str, Any]:
    """A whole comparison as JSON."""
    return {"scenario": name, "seed": seed, "policies": [result_body(one) for one in results]}


def _spread_body(spread: Spread) -> dict[str, float]:
    return {"mean": spread.mean, **{f"p{percent}": spread[percent] for percent in PERCENTILES}}
