"""How long answers take, though most of them have not ended yet. Pure.

Who looks at answers that ended sees the short ones first: of those that began ten seconds ago only
answers below ten seconds are known. The time that *all* spent at replicas, divided by the number
that ended, has no such lean (total time on test over failures: Epstein and Sobel, *Life testing*,
1953; exact for exponential times). In the long run it is Little's law.
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


def stayed(before: Stay, signals: TotalDemand, pace: Pace) -> Stay:
    """With one more report, of a second. The time that prompts take is left out: it is known when
    they come."""
    prompts = signals.computed_tokens_per_s * pace.prompt_token_s
    served = max(signals.ongoing - signals.queued, 0.0)
    if not before.busy_s and pace.known:
        usual_s = pace.output_tokens * pace.token_s(served)
        before = Stay(KNOWN_BEFORE * usual_s, KNOWN_BEFORE)
    mean_s = before.busy_s / before.ended if before.ended else 1.0
    fade = min(signals.finished_per_s / REMEMBERED, 1.0 / (STAYS * max(mean_s, 1e-3)))
    kept = math.exp(-fade)
    busy_s = before.busy_s * kept + max(served - prompts, 0.0)
    return Stay(busy_s, before.ended * kept + signals.finished_per_s)


def answer_s(stay: Stay, pace: Pace, slots: float) -> float:
    """Seconds that a usual answer takes at a replica that is as full as it is to be."""
    usual_s = pace.output_tokens * pace.token_s(slots)
    if stay.ended < LEAST_ENDED:
        return usual_s
    return min(stay.busy_s / stay.ended, MOST_TIMES * usual_s)
