"""Replica-hours and late requests of the scaling algorithms, in the simulator: part of
``make bench-fleet``.

*Late* are requests that waited for a replica to begin for longer than a second. Each algorithm is
production's, told what production is told; all begin with the same replicas and without history.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from scaling_cases import Trace, held_out, known, policies, setting_of

from cloudlm.sim.simulation import Policy, simulate

MOST_LATE = 0.01
ABOUT = 0.0005
"""Shares of late requests that differ by less are equal: of 20,000 requests 1 % is known to 0.07 %
(one standard deviation of a binomial share)."""
SHORT = 1
"""Traces of each kind in a short run."""
OURS = "tokens"
FAMILIES = (OURS, "hpa", "kpa")
GOAL = 0.90
"""Of the replica-hours of the better of HPA and Knative."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Replica-hours, and the share of requests that were late."""

    hours: float
    late: float

    def __str__(self) -> str:
        return f"{self.hours:.2f} h, {100 * self.late:.2f} %"


@dataclass(frozen=True, slots=True)
class Line:
    """One trace under all policies, by name: the family, and its target."""

    name: str
    outcomes: Mapping[str, Outcome]

    def family(self, name: str) -> list[Outcome]:
        """The outcomes of a family."""
        return [one for policy, one in self.outcomes.items() if policy.split()[0] == name]

    @property
    def level(self) -> float:
        """The share of late requests to compare at: 1 %, or the least that ``tokens`` reached."""
        return max(MOST_LATE, min(one.late for one in self.family(OURS)))

    def best(self) -> tuple[str, float] | None:
        """The cheapest other family at that level, and its hours; None if none reaches it."""
        others = {name.split()[0] for name in self.outcomes} - {OURS}
        found = [(name, hours_at(self.family(name), self.level)) for name in sorted(others)]
        reached = [(name, hours) for name, hours in found if hours is not None]
        return min(reached, key=lambda pair: pair[1], default=None)


def hours_at(outcomes: Sequence[Outcome], late: float) -> float | None:
    """Replica-hours at about that share of late requests, on the line through the outcomes that no
    other beats in both; None if all are late more often, and those of the cheapest if none is."""
    front: list[Outcome] = []
    for one in sorted(outcomes, key=lambda one: (one.hours, one.late)):
        if not front or one.late < front[-1].late:
            front.append(one)
    late += ABOUT
    for dear, cheap in zip(front[::-1], front[::-1][1:], strict=False):
        if dear.late <= late < cheap.late:
            share = (late - dear.late) / (cheap.late - dear.late)
            return dear.hours + (cheap.hours - dear.hours) * share
    if not front or front[-1].late > late:
        return None
    return front[0].hours


def measure(name: str, trace: Trace, compared: Sequence[Policy]) -> Line:
    """A trace under the policies."""
    setting = setting_of(trace)
    outcomes = {}
    for policy in compared:
        result = simulate(policy, setting, trace())
        outcomes[policy.name] = Outcome(result.replica_hours, result.late)
    print(f"autoscaling, {name}: {outcomes[OURS]}", file=sys.stderr, flush=True)
    return Line(name, outcomes)


def section(asked: Namespace) -> str:
    """The text for RESULTS.md."""
    compared = policies()
    most = SHORT if asked.short else None
    tuned, fresh = (
        [measure(name, trace, compared) for name, trace in islice(traces.items(), most)]
        for traces in (known(asked.traces), held_out(asked.traces))
    )
    return "\n".join(
        [
            "## Autoscaling: `make bench-fleet` (simulated)\n",
            "Replicas of 8 slots that start in 30 s; 28 ms for each step of decoding and 0.125 ms "
            "for each prompt token, assumed; requests beyond the slots wait in the gateway. Each "
            "cell: replica-hours from the order to the end of a replica, and the share of requests "
            "that waited more than a second until a replica began. `tokens`, `hpa` and `kpa` are "
            "production's code with production's measurements, without history at first. `tokens` "
            "without a number is as it comes, with one it has that `late_share`; `hpa` and `kpa` "
            "aim at that share of the slots (100 %, 80 % and 70 % are usual). The Azure and "
            "Mooncake traces are recorded (an hour each), the others are drawn.\n",
            *_table("Traces that were at hand while the algorithms were written", tuned),
            *_table("Held-out traces: nothing was set by them", fresh),
            *_verdict([*tuned, *fresh], {one.name for one in fresh}),
        ]
    )


def _table(title: str, lines: Sequence[Line]) -> Iterator[str]:
    names = list(lines[0].outcomes)
    yield f"**{title}**\n"
    yield f"| policy | {' | '.join(line.name for line in lines)} |"
    yield f"|---{'|--:' * len(lines)}|"
    for name in names:
        yield f"| {name} | {' | '.join(str(line.outcomes[name]) for line in lines)} |"
    yield ""


def _verdict(lines: Sequence[Line], fresh: set[str]) -> Iterator[str]:
    """What is met of the goal, trace by trace."""
    yield (
        "Replica-hours at equal lateness, 1 % or the least that `tokens` reached: each family's on "
        "the line through its points, so that every family's target is the best for that very "
        "trace (the goal: at most 0.90 times the better of the others):\n"
    )
    yield "| trace | late | tokens | hpa | kpa | ratio | |\n|---|--:|--:|--:|--:|--:|---|"
    met = 0
    for line in lines:
        cells, ours = [], hours_at(line.family(OURS), line.level)
        assert ours is not None
        for name in FAMILIES:
            hours = hours_at(line.family(name), line.level)
            cells.append("never" if hours is None else f"{hours:.2f} h")
        found = line.best()
        ratio = ours / found[1] if found else None
        kept = ratio is None or ratio <= GOAL
        met += kept
        name = f"{line.name}{', held out' if line.name in fresh else ''}"
        yield (
            f"| {name} | {100 * line.level:.2f} % | {' | '.join(cells)} | "
            f"{'-' if ratio is None else f'{ratio:.2f}'} | {'met' if kept else 'not met'} |"
        )
    yield f"\nMet on {met} of {len(lines)} traces."
