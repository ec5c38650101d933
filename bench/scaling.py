"""Replica-hours and late requests of the three scaling algorithms, on one trace after another.

    python bench/scaling.py [--trace FILE] [--only NAME]

Simulated, not measured: replicas have a number of places and a start time; a request holds a place
for its prompt's and its answer's time; those that find none wait in line. The algorithms are those
that decide in production (``control.autoscale``) and learn the replicas' pace as there. *Late* are
requests that waited longer than a second. The Azure trace is a file with a row of arrival, prompt
tokens and answer tokens per request; the others are drawn here, each from its seed.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from cloudlm.control.autoscale import Fleet, ScaleMemory, autoscale
from cloudlm.core.deployment import Demand, DeploymentSpec
from cloudlm.core.pace import Pace
from cloudlm.core.scaling import Algorithm, Scaling

PLACES = 8
START_S = 30.0
PROMPT_TOKENS_PER_S = 8000.0
OUTPUT_TOKEN_S = 0.028
LATE_S = 1.0
REPORT_S = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """One row of a trace: when it comes, seconds, and its tokens."""

    at: float
    prompt: int
    answer: int

    @property
    def duration_s(self) -> float:
        return self.prompt / PROMPT_TOKENS_PER_S + self.answer * OUTPUT_TOKEN_S


@dataclass(slots=True)
class Simulation:
    """Replicas, places and a line. ``hours`` are paid from a replica's start to its last answer."""

    spec: DeploymentSpec
    trace: list[Request]
    places: int = PLACES
    start_s: float = START_S
    now: float = 0.0
    hours: float = 0.0
    late: int = 0
    ready: dict[int, int] = field(default_factory=dict)
    leaving: dict[int, int] = field(default_factory=dict)
    starting: deque[float] = field(default_factory=deque)
    line: deque[Request] = field(default_factory=deque)
    ends: list[tuple[float, int, int, Request]] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)
    arrived: list[Request] = field(default_factory=list)
    born: int = 0
    begun: int = 0

    def run(self) -> tuple[float, float]:
        """Replica-hours, and the share of late requests in percent."""
        early = [one for one in self.trace if one.at < 60.0]
        at_first = math.ceil(sum(one.duration_s for one in early) / 60.0 / self.places / 0.55)
        for _ in range(max(at_first, 1)):
            self._add()
        memory = ScaleMemory(pace=Pace(start_s=self.start_s))
        next_request, next_look = 0, 0.0
        while next_request < len(self.trace) or self.line:
            arrival = self.trace[next_request].at if next_request < len(self.trace) else math.inf
            end = self.ends[0][0] if self.ends else math.inf
            start = self.starting[0] if self.starting else math.inf
            moment = min(arrival, end, start, next_look)
            paid = len(self.ready) + len(self.leaving) + len(self.starting)
            self.hours += (moment - self.now) * paid / 3600.0
            self.now = moment
            if moment == end:
                self._end()
            elif moment == start:
                self.starting.popleft()
                self._add()
            elif moment == arrival:
                self.line.append(self.trace[next_request])
                self.arrived.append(self.trace[next_request])
                next_request += 1
            else:
                memory = self._look(memory)
                next_look = self.now + REPORT_S
            self._place()
        return self.hours, 100.0 * self.late / len(self.trace)

    def _add(self) -> None:
        self.ready[self.born] = 0
        self.born += 1

    def _end(self) -> None:
        _, _, replica, request = heapq.heappop(self.ends)
        self.ended.append(request)
        if replica in self.ready:
            self.ready[replica] -= 1
        else:
            self.leaving[replica] -= 1
            if not self.leaving[replica]:
                del self.leaving[replica]

    def _place(self) -> None:
        while self.line and self.ready:
            replica = min(self.ready, key=self.ready.__getitem__)
            if self.ready[replica] >= self.places:
                return
            request = self.line.popleft()
            self.late += self.now - request.at > LATE_S
            self.ready[replica] += 1
            self.begun += 1
            end = (self.now + request.duration_s, self.begun, replica, request)
            heapq.heappush(self.ends, end)

    def _look(self, memory: ScaleMemory) -> ScaleMemory:
        current = len(self.ready) + len(self.starting)
        ages = tuple(self.start_s - (at - self.now) for at in self.starting)
        fleet = Fleet(len(self.ready), ages)
        wanted, memory = autoscale(self.spec, [self._report()], current, memory, self.now, fleet)
        for _ in range(wanted - current):
            self.starting.append(self.now + self.start_s)
        for _ in range(current - wanted):
            if self.starting:
                self.starting.pop()
                continue
            replica = min(self.ready, key=self.ready.__getitem__)
            busy = self.ready.pop(replica)
            if busy:
                self.leaving[replica] = busy
        return memory

    def _report(self) -> Demand:
        ended, arrived = self.ended, self.arrived
        self.ended, self.arrived = [], []
        served = sum(self.ready.values()) + sum(self.leaving.values())
        first_s = sum(one.prompt for one in ended) / PROMPT_TOKENS_PER_S / max(len(ended), 1)
        return Demand(
            "bank",
            "g1",
            served + len(self.line),
            len(self.line),
            len(arrived) / REPORT_S,
            self.now,
            prompt_tokens_per_s=sum(one.prompt for one in arrived) / REPORT_S,
            waiting_prompt_tokens=sum(one.prompt for one in self.line),
            finished_per_s=len(ended) / REPORT_S,
            output_tokens_per_s=sum(one.answer for one in ended) / REPORT_S,
            computed_tokens_per_s=sum(one.prompt for one in ended) / REPORT_S,
            ttft_s=first_s,
            tpot_s=OUTPUT_TOKEN_S if ended else 0.0,
        )


def azure(path: Path) -> list[Request]:
    """A trace of Azure's format, from its first request on."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    times = [datetime.fromisoformat(row[0][:26]).timestamp() for row in rows]
    return [
        Request(at - times[0], int(row[1]), int(row[2]))
        for at, row in zip(times, rows, strict=True)
    ]


def drawn(
    rate: Callable[[float], float], length_s: float, seed: int, spread: float = 1.0
) -> list[Request]:
    """Requests at ``rate`` per second, with gamma-distributed gaps of that coefficient of
    variation (1: Poisson), and log-normal prompts and answers."""
    draw = random.Random(seed)
    shape = 1.0 / spread**2
    step_s, now, passed = 0.25, 0.0, 0.0
    due = draw.gammavariate(shape, 1.0 / shape)
    found = []
    while now < length_s:
        passed += rate(now) * step_s
        while due <= passed:
            prompt = max(1, int(draw.lognormvariate(6.6, 0.9)))
            answer = max(1, min(1000, int(draw.lognormvariate(5.1, 0.75))))
            found.append(Request(now + draw.random() * step_s, prompt, answer))
            due += draw.gammavariate(shape, 1.0 / shape)
        now += step_s
    return sorted(found, key=lambda one: one.at)


def traces(path: Path | None) -> Iterator[tuple[str, list[Request]]]:
    """Every trace and its name; without ``path`` those drawn here alone."""
    if path is not None:
        yield "azure", azure(path)
    yield "poisson", drawn(lambda _: 5.4, 3600.0, 1)
    yield "bursts", drawn(lambda _: 5.4, 3600.0, 2, spread=4.0)
    yield "waves", drawn(lambda at: 5.4 * (1 + 0.8 * math.sin(at * math.tau / 3600)), 7200.0, 3)
    yield "ramp", drawn(_ramp, 3600.0, 4, spread=1.5)
    yield "steps", drawn(lambda at: 3.0 if at // 600 % 2 == 0 else 9.0, 3600.0, 5)
    yield "quiet", drawn(lambda _: 0.6, 3600.0, 6)
    yield "large", drawn(lambda at: 40 * (1 + 0.5 * math.sin(at * math.tau / 3600)), 3600.0, 7)


def _ramp(at: float) -> float:
    up = min(max((at - 900.0) / 600.0, 0.0), 1.0)
    down = min(max((at - 2400.0) / 300.0, 0.0), 1.0)
    return 1.0 + 12.0 * up - 10.0 * down


def policies() -> Iterator[tuple[str, Scaling]]:
    """The algorithms: ours as it is, the others at several targets, their usual ones among them."""
    yield "tokens", Scaling()
    for share in (0.6, 0.7, 0.8, 0.9, 1.0):
        yield f"hpa {share:.0%}", Scaling(Algorithm.HPA, utilization=share)
    for share in (0.5, 0.6, 0.7, 0.8):
        yield f"kpa {share:.0%}", Scaling(Algorithm.KPA, utilization=share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, help="a trace of Azure's format")
    parser.add_argument("--only", help="the name of one trace")
    asked = parser.parse_args()
    spec = DeploymentSpec(
        "bank", "models:/bank/1", max_replicas=200, target_ongoing_requests=PLACES
    )
    for name, trace in traces(asked.trace):
        if asked.only in (None, name):
            for policy, scaling in policies():
                hours, late = Simulation(replace(spec, scaling=scaling), trace).run()
                print(
                    f"{name:8} {policy:9} {hours:7.2f} replica-hours  {late:6.2f} % late",
                    flush=True,
                )


if __name__ == "__main__":
    main()
