"""How many replicas a deployment may have and what decides it: what a user may say of it.

Words and bounds alone. Must not decide how many run: ``control.autoscale`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import Fields, check_number
from cloudlm.core.schedule import Schedule, check_schedule, schedule_body, schedule_from_body

MAX_SCHEDULES = 64
MAX_WINDOW_S = 86_400.0
IDLE_S = 300.0


class Algorithm(StrEnum):
    """What decides how many replicas a deployment needs."""

    TOKENS = "tokens"
    HPA = "hpa"
    KPA = "kpa"


@dataclass(frozen=True, slots=True)
class Scaling:
    """A deployment's wishes.

    ``target_ttft_ms`` and ``target_tpot_ms`` are the mean times to the first token and for each
    further one that more replicas are to keep; 0 leaves them aside. ``utilization`` is the share of
    ``target_ongoing_requests`` that ``hpa`` and ``kpa`` aim at; 0 takes 1 for ``hpa`` and 0.7 for
    ``kpa``. ``late_share`` of requests may wait longer than ``target_ttft_ms`` by what ``tokens``
    foresees; 0 is its own. ``stable_window_s`` is what ``kpa`` averages over. Fewer replicas are
    asked for only when nothing more was needed for ``down_window_s``, more only when that much was
    needed all through ``up_window_s``; None is the algorithm's own. With ``min_replicas`` 0 the
    last replica goes after ``idle_s`` without a request. While a schedule holds, its bounds do.
    """

    algorithm: Algorithm = Algorithm.TOKENS
    target_ttft_ms: float = 0.0
    target_tpot_ms: float = 0.0
    utilization: float = 0.0
    stable_window_s: float = 60.0
    up_window_s: float = 0.0
    down_window_s: float | None = None
    idle_s: float = IDLE_S
    schedules: tuple[Schedule, ...] = ()
    late_share: float = 0.0


DEFAULT_SCALING = Scaling()


def check_scaling(scaling: Scaling) -> Scaling:
    """Return ``scaling`` if it may be used. Raises InvalidRequest naming the field."""
    check_number(scaling.target_ttft_ms, "scaling.target_ttft_ms", 0.0, 3_600_000.0)
    check_number(scaling.target_tpot_ms, "scaling.target_tpot_ms", 0.0, 3_600_000.0)
    check_number(scaling.utilization, "scaling.utilization", 0.0, 1.0)
    check_number(scaling.late_share, "scaling.late_share", 0.0, 0.5)
    check_number(scaling.stable_window_s, "scaling.stable_window_s", 6.0, 3600.0)
    check_number(scaling.up_window_s, "scaling.up_window_s", 0.0, MAX_WINDOW_S)
    if scaling.down_window_s is not None:
        check_number(scaling.down_window_s, "scaling.down_window_s", 0.0, MAX_WINDOW_S)
    check_number(scaling.idle_s, "scaling.idle_s", 0.0, 7 * MAX_WINDOW_S)
    if scaling.algorithm is Algorithm.KPA and (scaling.target_ttft_ms or scaling.target_tpot_ms):
        raise InvalidRequest(
            "scaling.algorithm kpa follows requests at once alone; for target_ttft_ms and "
            "target_tpot_ms use tokens or hpa",
            param="scaling.algorithm",
        )
    if len(scaling.schedules) > MAX_SCHEDULES:
        raise InvalidRequest(
            f"{len(scaling.schedules)} schedules are more than {MAX_SCHEDULES}",
            param="scaling.schedules",
        )
    for schedule in scaling.schedules:
        check_schedule(schedule)
    return scaling


def scaling_body(scaling: Scaling) -> dict[str, Any]:
    """A scaling as JSON; ``scaling_from_body`` reads it back."""
    return {
        "algorithm": scaling.algorithm.value,
        "target_ttft_ms": scaling.target_ttft_ms,
        "target_tpot_ms": scaling.target_tpot_ms,
        "utilization": scaling.utilization,
        "late_share": scaling.late_share,
        "stable_window_s": scaling.stable_window_s,
        "up_window_s": scaling.up_window_s,
        "down_window_s": scaling.down_window_s,
        "idle_s": scaling.idle_s,
        "schedules": [schedule_body(schedule) for schedule in scaling.schedules],
    }


def scaling_from_body(body: Any) -> Scaling:
    """Read a scaling by type; ``check_scaling`` looks at the values. Raises InvalidRequest and
    UnprocessableRequest naming the field."""
    fields = Fields(body, "scaling", path="scaling.")
    found = Scaling(
        algorithm=fields.choice("algorithm", Algorithm, Algorithm.TOKENS),
        target_ttft_ms=fields.number("target_ttft_ms", 0.0),
        target_tpot_ms=fields.number("target_tpot_ms", 0.0),
        utilization=fields.number("utilization", 0.0),
        late_share=fields.number("late_share", 0.0),
        stable_window_s=fields.number("stable_window_s", 60.0),
        up_window_s=fields.number("up_window_s", 0.0),
        down_window_s=fields.optional_number("down_window_s"),
        idle_s=fields.number("idle_s", IDLE_S),
        schedules=tuple(schedule_from_body(entry) for entry in fields.items("schedules", ())),
    )
    fields.end()
    return found
