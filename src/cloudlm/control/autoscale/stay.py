"""How long answers take, though most of them have not ended yet, and what prompts do to them. Pure.

Who looks at answers that ended sees the short ones first: of those that began ten seconds ago only
answers below ten seconds are known. The time that *all* spent at replicas, divided by the number
that ended, has no such lean (total time on test over failures: Epstein and Sobel, *Life testing*,
1953; exact for exponential times). In the long run it is Little's law.

A replica computes prompts and answers in the same steps, so that the share of time that goes to
prompts makes everything at it take longer, and the fewer replicas share the prompts, the longer.
What was measured holds for the replicas that there were; ``crowded`` tells what of it is work, to
be had with any number of them. Prompts pass one at a time, so the mean number of requests in their
prompt, ``z`` at each replica by Little's law, says for which share of its time one computes:
``z / (1 + z)``, as in the queue M/M/1.
"""

from __future__ import annotations

import math

from cloudlm.control.autoscale.facts import Stay, TotalDemand
from cloudlm.core.pace import Pace

KNOWN_BEFORE = 20.0
"""For how many requests a pace counts that was measured earlier."""
REMEMBERED = 200.0
"""How many requests are remembered, but for no shorter than STAYS stays."""
STAYS = 8.0
LEAST_ENDED = 3.0
MOST_TIMES = 4.0
"""Of what the answers that ended say; requests that hang must not buy replicas without end."""


def stayed(before: Stay, signals: TotalDemand, pace: Pace, replicas: int) -> Stay:
    """With one more report, of a second in which so many ``replicas`` answered. The time that
    prompts take is told apart: it is known when they come."""
    prompts = signals.computed_tokens_per_s * pace.prompt_token_s
    served = max(signals.ongoing - signals.queued, 0.0)
    if not before.busy_s and pace.known:
        usual_s = pace.output_tokens * pace.token_s(served)
        before = Stay(KNOWN_BEFORE * usual_s, KNOWN_BEFORE)
    mean_s = before.busy_s / before.ended if before.ended else 1.0
    fade = min(signals.finished_per_s / REMEMBERED, 1.0 / (STAYS * max(mean_s, 1e-3)))
    kept = math.exp(-fade)
    return Stay(
        before.busy_s * kept + max(served - prompts, 0.0),
        before.ended * kept + signals.finished_per_s,
        before.arrived * kept + signals.requests_per_s,
        before.prompt_tokens * kept + signals.prompt_tokens_per_s,
        before.replicas_s * kept + replicas,
    )


def crowded(stay: Stay, pace: Pace, each_s: float) -> tuple[float, float]:
    """The share of a replica's time that went to prompts, and that of the work that prompts are
    where answers take ``each_s``."""
    if not stay.prompt_tokens or not stay.replicas_s:
        return 0.0, 0.0
    prompts_s = stay.prompt_tokens * pace.prompt_token_s
    at_once = prompts_s / stay.replicas_s
    return at_once / (1.0 + at_once), prompts_s / (prompts_s + stay.arrived * each_s)


def usual_prompt(stay: Stay) -> float:
    """Tokens of a usual prompt that replicas have to compute."""
    return stay.prompt_tokens / stay.arrived if stay.arrived else 0.0


def answer_s(stay: Stay, pace: Pace, slots: float) -> float:
    """Seconds that a usual answer takes at a replica that is as full as it is to be."""
    usual_s = pace.output_tokens * pace.token_s(slots)
    if stay.ended < LEAST_ENDED:
        return usual_s
    return min(stay.busy_s / stay.ended, MOST_TIMES * usual_s)
