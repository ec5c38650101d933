"""What became of roll-outs, as rows of a table, as JSON and as parts of the page. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from cloudlm.sim.plots import Line, clock, linear, plot, thinned
from cloudlm.sim.rollouts import RolloutResult
from cloudlm.sim.simulation import Result

MEASURES = (
    "outcome",
    "decided after, s",
    "over after, s",
    "attempts at it",
    "failed",
    "copies",
    "mean score",
    "not answered meanwhile",
    "extra replica-hours",
    "extra cost",
)


def rollout_columns(results: Sequence[Result]) -> list[str]:
    """A name for every roll-out of every policy."""
    return [f"{one.policy}: {course.name}" for one in results for course in one.rollouts]


def rollout_rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """A row per measure: its name, and each roll-out's number under ``rollout_columns``."""
    columns = [_column(course) for one in results for course in one.rollouts]
    return list(zip(MEASURES, *columns, strict=True)) if columns else []


def rollout_reasons(results: Sequence[Result]) -> list[str]:
    """Why each that was not promoted was not, in words."""
    return [
        f"{one.policy}: {course.name} {course.outcome.value.replace('_', ' ')}: {course.reason}"
        for one in results
        for course in one.rollouts
        if course.reason
    ]


def rollout_body(course: RolloutResult) -> dict[str, Any]:
    """A roll-out as JSON."""
    return {**asdict(course), "outcome": course.outcome.value}


def rollout_table(results: Sequence[Result]) -> str:
    """The page's table, a row per roll-out; empty without any."""
    rows = rollout_rows(results)
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name.capitalize())}</th>" for name in ("roll-out", *MEASURES))
    body = []
    for name, *cells in zip(rollout_columns(results), *(row[1:] for row in rows), strict=True):
        numbers = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body.append(f"<tr><td>{escape(name)}</td>{numbers}</tr>")
    reasons = "".join(f"<p>{escape(one)}</p>" for one in rollout_reasons(results))
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>{reasons}'


def rollout_plots(results: Sequence[Result]) -> list[tuple[str, str, str]]:
    """The page's plots: title, text, picture; none without a roll-out."""
    shares: list[Line] = []
    replicas: list[Line] = []
    for number, one in enumerate(results):
        for course in one.rollouts:
            share = [(seen.at, 100.0 * seen.share) for seen in course.seen]
            shares.append(Line(one.policy, thinned(share), str(number)))
            both = [(seen.at, float(seen.new + seen.others)) for seen in course.seen]
            replicas.append(Line(one.policy, thinned(both), str(number), steps=True))
    points = [at for line in shares for at, _ in line.points]
    if not points:
        return []
    time = clock(max([*(one.ended_at for one in results), 1.0]))
    most = max((value for line in replicas for _, value in line.points), default=1.0)
    return [
        (
            "Requests to the new version",
            "Share of the attempts of each second, while more than one version is there.",
            plot("share of the new version", shares, time, linear(100.0, unit=" %")),
        ),
        (
            "Replicas of all versions",
            "That answer while a roll-out goes on: what is above the usual is its surge.",
            plot("replicas in a roll-out", replicas, time, linear(most or 1.0)),
        ),
    ]


def _column(course: RolloutResult) -> tuple[str, ...]:
    return (
        course.outcome.value.replace("_", " "),
        _after(course.decided_at, course),
        _after(course.over_at, course),
        f"{course.attempts:,}",
        f"{course.failed:,}",
        f"{course.copies:,}",
        "-" if course.score is None else f"{course.score:.2f}",
        f"{course.unanswered:,}",
        f"{course.extra_replica_hours:.2f}",
        f"{course.extra_cost:.2f}",
    )


def _after(at: float | None, course: RolloutResult) -> str:
    return "not yet" if at is None else f"{at - course.began_at:.0f}"
