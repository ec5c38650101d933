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
SHORT = 1
"""Traces of each kind in a short run."""
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
    """One trace under all policies, by name; ``tokens`` is the first."""

    name: str
    outcomes: Mapping[str, Outcome]

    @property
    def ours(self) -> Outcome:
        return self.outcomes["tokens"]

    def best(self, most_late: float) -> tuple[str, Outcome] | None:
        """The cheapest of the others that is late no more often; None if all are."""
        within = [
            (name, one)
            for name, one in self.outcomes.items()
            if name != "tokens" and one.late <= most_late
        ]
        return min(within, key=lambda pair: pair[1].hours, default=None)


def measure(name: str, trace: Trace, compared: Sequence[Policy]) -> Line:
    """A trace under the policies."""
    setting = setting_of(trace)
    outcomes = {}
    for policy in compared:
        result = simulate(policy, setting, trace())
        outcomes[policy.name] = Outcome(result.replica_hours, result.late)
    print(f"autoscaling, {name}: {outcomes['tokens']}", file=sys.stderr, flush=True)
    return Line(name, outcomes)


def section(asked: Namespace) -> str:
    """The text for RESULTS.md."""
    compared = policies()
    most = SHORT if asked.short else None
    tuned, fresh = (
        [measure(name, trace, compared) for name, trace in islice(traces.items(), most)]
        for traces in (known(asked.traces), held_out())
    )
    return "\n".join(
        [
            "## Autoscaling: `make bench-fleet` (simulated)\n",
            "Replicas of 8 slots that start in 30 s; 28 ms for each step of decoding and 0.125 ms "
            "for each prompt token, assumed; requests beyond the slots wait in the gateway. Each "
            "cell: replica-hours from the order to the end of a replica, and the share of requests "
            "that waited more than a second until a replica began. `tokens`, `hpa` and `kpa` are "
            "production's code with production's measurements; `hpa` and `kpa` aim at the stated "
            "share of the slots (80 % and 70 % are usual). The Azure trace is recorded (19,366 "
            "requests of one hour), the others are drawn.\n",
            *_table("Traces that were at hand while the algorithms were written", tuned),
            *_table("Held-out traces: drawn afterwards, nothing was set by them", fresh),
            *_verdict([*tuned, *fresh], {one.name for one in fresh}),
        ]
    )


def _table(title: str, lines: Sequence[Line]) -> Iterator[str]:
    names = list(lines[0].outcomes)
    yield f"**{title}**\n"
    yield f"| trace | {' | '.join(names)} |"
    yield f"|---{'|--:' * len(names)}|"
    for line in lines:
        cells = " | ".join(str(line.outcomes[name]) for name in names)
        yield f"| {line.name} | {cells} |"
    yield ""


def _verdict(lines: Sequence[Line], fresh: set[str]) -> Iterator[str]:
    """What is met of the goal, trace by trace."""
    yield (
        "Against the cheapest of the others that is late for no more requests than `tokens`, "
        "or than 1 % where `tokens` keeps that, its target chosen for that very trace afterwards "
        "(the goal: at most 0.90 times its hours):\n"
    )
    met = 0
    for line in lines:
        found = line.best(max(MOST_LATE, line.ours.late))
        kept = "" if line.ours.late <= MOST_LATE else f" (`tokens`: {100 * line.ours.late:.2f} %)"
        name = f"{line.name}{', held out' if line.name in fresh else ''}"
        if found is None:
            met += 1
            yield f"- {name}: no other is late so rarely{kept}"
            continue
        ratio = line.ours.hours / found[1].hours
        met += ratio <= GOAL
        verdict = "met" if ratio <= GOAL else "not met"
        yield f"- {name}: {ratio:.2f} times {found[0]} ({found[1]}){kept}: {verdict}"
    yield f"\nMet on {met} of {len(lines)} traces."
