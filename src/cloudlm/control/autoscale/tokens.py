"""The default rule: replicas for the token work that will be there when a new one is ready. Pure.

*Load.* Prompts and answers cost time of their own: the work that arrives in a second is the tokens
of its prompts that are not cached, each times the version's measured time, and the answers to be
expected, each as long as answers of late take: ``stay``. By Little's law that is the number of
requests that will be at replicas at once; unlike a count of requests it knows long prompts before
they are answered, and a queue is not taken for load. Until a version's pace is measured, requests
at once stand for it.

*Forecast.* The load one start ahead, and how wrong such forecasts were: ``forecast``.

*Staffing.* The fewest replicas with which at most a small share of requests is foreseen to wait
longer than the time to the first token that is asked for: ``staffing``.

*Crowding.* Prompts and answers share a replica's steps: what was measured at the replicas there
were is turned into work alone (``stay.crowded``), and the load that it makes is reckoned anew for
every number of replicas (``staffing``). Else many replicas, where stays are short, make few seem
enough.

*Backlog.* What will wait in one start, after all that replicas which answer or start can do until
then, is worked off within one start.

*Going down.* A replica that goes and is asked for again costs a start: it goes only when it was not
needed for some starts' length (ski rental; Gandhi, Harchol-Balter, Raghunathan and Kozuch,
*AutoScale*, ACM TOCS 2012). A recommendation stands for no longer than what its forecast was made
of, a start at least, and a fall of the load beyond chance ends those before it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from cloudlm.control.autoscale.facts import (
    Fleet,
    Forecast,
    Recommendation,
    ScaleMemory,
    TotalDemand,
)
from cloudlm.control.autoscale.forecast import observed
from cloudlm.control.autoscale.staffing import needed
from cloudlm.control.autoscale.stay import answer_s, crowded, stayed, usual_prompt
from cloudlm.control.autoscale.windows import stabilised
from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.pace import Pace

UNKNOWN_START_S = 60.0
LATE_SHARE = 0.25
"""Of requests, as foreseen one start ahead. Whole replicas that are kept for a while, and errors
that are counted twice (``staffing``), leave some twentieth of it."""
WAIT_S = 1.0
STARTS_KEPT, LONG_STARTS_KEPT = 8.0, 3.0
LEAST_DOWN_WINDOW_S, LONG_DOWN_WINDOW_S = 60.0, 300.0
TOLERANCE = 0.1
_OVERLOADED = 1.5


def by_tokens(
    spec: DeploymentSpec,
    signals: TotalDemand,
    fleet: Fleet,
    current: int,
    memory: ScaleMemory,
    now: float,
) -> tuple[int, ScaleMemory]:
    """Wanted replicas without the spec's bounds, of which the highest limits the search."""
    memory = _learned(spec, signals, fleet, current, memory)
    pace, slots = memory.pace, spec.target_ongoing_requests
    start_s = pace.start_s or UNKNOWN_START_S
    each_s = answer_s(memory.stay, pace, slots) if pace.known else 0.0
    request_s = usual_prompt(memory.stay) * pace.prompt_token_s + each_s if pace.known else WAIT_S
    crowd, prompts = crowded(memory.stay, pace, each_s) if pace.known else (0.0, 0.0)
    alone = 1.0 - crowd
    load, alone_s = _load(signals, pace, each_s) * alone, request_s * alone
    # Requests at once are no work: what was foreseen of them says little of it.
    before = memory.forecast if memory.forecast.by_work == pace.known else Forecast()
    ahead = observed(before, load, signals.requests_per_s, alone_s, start_s, now)
    ahead = replace(ahead, by_work=pace.known)
    foreseen = ahead.load / alone
    backlog = _backlog(signals, fleet, current, slots, request_s, start_s, foreseen, pace.known)
    backlog *= alone
    most = max(spec.max_replicas, current)
    wanted = _staffed(spec, ahead, backlog, alone_s, prompts, most)
    wanted, late = _in_time(spec, fleet, current, memory, wanted)
    steady, history = _held(spec, ahead, wanted, current, memory, start_s, now)
    why = f"tokens: {_said(signals, ahead, backlog, start_s)}, {slots:g} at each replica{late}"
    return steady, replace(memory, forecast=ahead, recommendations=history, why=why)


def _held(
    spec: DeploymentSpec,
    ahead: Forecast,
    wanted: int,
    current: int,
    memory: ScaleMemory,
    start_s: float,
    now: float,
) -> tuple[int, tuple[Recommendation, ...]]:
    """``wanted``, held back by what was recommended of late, and the history with it. A time that
    the user set holds without exception."""
    down_s, stands_s = _kept_s(spec, start_s), math.inf
    earlier = memory.recommendations
    if spec.scaling.down_window_s is None:
        stands_s = max(ahead.known_s, start_s)
        if ahead.fell:  # what was recommended before is of another traffic
            earlier = (Recommendation(now, wanted),)
    return stabilised(earlier, wanted, current, now, spec.scaling.up_window_s, down_s, stands_s)


def _kept_s(spec: DeploymentSpec, start_s: float) -> float:
    """For how long a replica is kept that is not needed: eight starts, or three of long ones."""
    if spec.scaling.down_window_s is not None:
        return spec.scaling.down_window_s
    most_s = max(LONG_DOWN_WINDOW_S, LONG_STARTS_KEPT * start_s)
    return min(max(STARTS_KEPT * start_s, LEAST_DOWN_WINDOW_S), most_s)


def _said(signals: TotalDemand, ahead: Forecast, backlog: float, start_s: float) -> str:
    """For people: the work at once that replicas are wanted for."""
    if ahead.load + backlog <= 0:
        return f"{signals.ongoing:g} requests ask" if signals.ongoing else "nobody asks"
    parts = [f"{ahead.load:.3g} requests at once foreseen in {start_s:.3g} s"]
    if backlog > 0:
        parts.append(f"{backlog:.3g} for what waits")
    return ", ".join(parts)


def _staffed(
    spec: DeploymentSpec,
    ahead: Forecast,
    backlog: float,
    request_s: float,
    prompts: float,
    most: int,
) -> int:
    """Replicas for what is foreseen, and for what waits: of nothing nothing can be more."""
    load, slots, scaling = ahead.load + backlog, spec.target_ongoing_requests, spec.scaling
    if load <= 0:
        return 0
    if not ahead.by_work:
        return min(math.ceil(load / slots - 1e-9), most)
    wait_s = scaling.target_ttft_ms / 1000.0 or WAIT_S
    share = scaling.late_share or LATE_SHARE
    return needed(load, slots, request_s, wait_s, most, share, ahead.errors, prompts)


def _load(signals: TotalDemand, pace: Pace, each_s: float) -> float:
    """The work that arrives, as requests at once."""
    if not pace.known:
        return signals.ongoing
    prompts = signals.prompt_tokens_per_s * pace.prompt_token_s
    return prompts + signals.requests_per_s * each_s


def _backlog(
    signals: TotalDemand,
    fleet: Fleet,
    current: int,
    slots: float,
    request_s: float,
    start_s: float,
    load: float,
    known: bool,
) -> float:
    """What must be served beside ``load`` for one start's length to work off what will wait by then
    of those who wait and those who come, as requests at once."""
    if not known:
        return 0.0
    horizon_s = max(start_s, request_s)
    waiting_s = signals.queued * request_s
    served_s = fleet.answering(current) * slots * horizon_s
    for age_s in fleet.starting_s:
        served_s += slots * max(0.0, horizon_s - max(start_s - age_s, 0.0))
    return max(waiting_s + load * horizon_s - served_s, 0.0) / horizon_s


def _learned(
    spec: DeploymentSpec, signals: TotalDemand, fleet: Fleet, current: int, memory: ScaleMemory
) -> ScaleMemory:
    """With what a fresh report says of the version's pace. At replicas that are far beyond their
    target requests wait for each other, which says nothing of the pace."""
    ready = fleet.answering(current)
    fresh = signals.measured_at != memory.measured_at  # by gateways' clocks, which may jump
    if fresh:
        memory = replace(memory, stay=stayed(memory.stay, signals, memory.pace, ready))
    if not fresh or not signals.finished_per_s or not signals.tpot_s or ready <= 0:
        return replace(memory, measured_at=signals.measured_at)
    ongoing = max(signals.ongoing - signals.queued, 0.0) / ready
    pace = memory.pace
    if ongoing <= _OVERLOADED * spec.target_ongoing_requests:
        computed = signals.computed_tokens_per_s / signals.finished_per_s
        answer = signals.output_tokens_per_s / signals.finished_per_s
        pace = pace.answered(signals.ttft_s / max(computed, 1.0), answer, signals.tpot_s, ongoing)
    return replace(
        memory,
        pace=pace,
        measured_at=signals.measured_at,
        ttft_s=signals.ttft_s,
        tpot_s=signals.tpot_s,
    )


def _in_time(
    spec: DeploymentSpec, fleet: Fleet, current: int, memory: ScaleMemory, wanted: int
) -> tuple[int, str]:
    """More while answers take longer than asked for, once those that are starting have begun to
    help; no fewer until they are well within it. The more are to answer: they come beside those
    that are lost, but not beside more of these than answer, or where nothing comes up all that may
    be would be started for nothing."""
    scaling = spec.scaling
    ratios = [
        measured_s * 1000.0 / asked_ms
        for measured_s, asked_ms in (
            (memory.ttft_s, scaling.target_ttft_ms),
            (memory.tpot_s, scaling.target_tpot_ms),
        )
        if asked_ms and measured_s
    ]
    worst = max(ratios, default=0.0)
    answering = fleet.answering(current)
    helpless = fleet.lost and not answering
    if worst > 1.0 + TOLERANCE and not fleet.starting_s and not helpless:
        more = math.ceil(max(answering, 1) * min(worst, 2.0)) + min(fleet.lost, answering)
        return max(wanted, current, more), f"; answers take {worst:.2g} times what is asked"
    if worst > 1.0 - TOLERANCE:
        return max(wanted, current), "; answers take about what is asked"
    return wanted, ""
