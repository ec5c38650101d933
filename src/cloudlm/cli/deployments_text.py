"""How ``cloudlm status`` shows deployments, their memory, their replicas. Must not ask control."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from cloudlm.cli.screen import age_text, print_table
from cloudlm.core.deployment import DeploymentSpec, DeploymentStatus, Residence
from cloudlm.core.wire import DeploymentView


def memory_text(found: list[DeploymentView], budget_bytes: int) -> str:
    """How much of the memory budget is taken, and how many deployments stand how."""
    from cloudlm.control.footprint import amount_text

    states = [view.status for view in found if view.status and view.status.residence]
    counts = Counter(one.residence for one in states)
    held = amount_text(sum(one.memory_bytes for one in states))
    standing = ", ".join(f"{counts[one]} {_spoken(one)}" for one in Residence if counts[one])
    return f"memory: {held} of {amount_text(budget_bytes)} held; {standing}"


def _spoken(residence: Residence) -> str:
    return residence.value.replace("_", " ")


def status_row(view: DeploymentView, within: bool, now: float) -> tuple[Any, ...]:
    """``within`` a memory budget there is a column more. ``now`` is Unix time, seconds."""
    status = view.status
    ready = f"{status.ready_replicas}/{status.wanted_replicas}" if status else "0"
    message = status.message if status else ""
    memory: tuple[str, ...] = ()
    if within:
        memory = (_residence_text(status, pinned=view.spec.pinned),)
    bounds, revision = _bounds_text(view.spec, now), view.deployment.revision
    return (view.name, view.phase, ready, bounds, *memory, view.spec.model, revision, message)


def _bounds_text(spec: DeploymentSpec, now: float) -> str:
    """MIN:MAX of the replicas, as they were asked for or as a schedule has them ``now``."""
    asked = held = spec.min_replicas, spec.max_replicas
    if spec.scaling.schedules:
        from cloudlm.control.autoscale import Fleet
        from cloudlm.control.autoscale.bounds import bounds_now

        held = bounds_now(spec, Fleet(wall_s=now), start_s=0.0)
    text = f"{held[0]}:{held[1]}"
    return text if held == asked else f"{text} by schedule"


def _residence_text(status: DeploymentStatus | None, *, pinned: bool) -> str:
    from cloudlm.control.footprint import amount_text

    if status is None or not status.residence:
        return ""
    word = _spoken(status.residence) + (", pinned" if pinned else "")
    return f"{amount_text(status.memory_bytes)}, {word}" if status.memory_bytes else word


def print_replicas(state: DeploymentStatus) -> None:
    now = time.time()
    rows = [
        (
            replica.id,
            replica.state,
            replica.url,
            replica.pid,
            replica.restarts,
            age_text(now - replica.started_at) if replica.started_at else "",
            replica.message,
        )
        for replica in state.replicas
    ]
    columns = ("REPLICA", "STATE", "ADDRESS", "PID", "RESTARTS", "AGE", "MESSAGE")
    print_table(columns, rows, "no replicas")
