"""Whether what a roll-out wants to start can ever be in memory, whoever else is unloaded for it.

What only waits for others is not told here: its turn comes (``residency``). Pure: ``residents``
gathers the sizes. Must not decide what becomes of a roll-out that can never go on: ``rollout``
does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cloudlm.control.footprint import amount_text
from cloudlm.control.residency import Claim, too_large
from cloudlm.control.room import Wish

NEVER = "can never be in memory"


@dataclass(frozen=True, slots=True)
class Side:
    """So many ``replicas`` of a revision on this machine, each of so many bytes."""

    revision: int
    replicas: int
    each_bytes: int

    def __str__(self) -> str:
        size = amount_text(self.each_bytes)
        return f"revision {self.revision} ({self.replicas} x {size})"


def never_fits(target: Side, stable: Side | None, left_bytes: int) -> bool:
    """Whether ``left_bytes`` are too few for both sides. A replica starts only where the larger of
    those that might has room, so the last one of the target counts as that."""
    if stable is None:
        return target.replicas * target.each_bytes > left_bytes
    last_bytes = max(target.each_bytes, stable.each_bytes)
    others_bytes = stable.replicas * stable.each_bytes
    others_bytes += (target.replicas - 1) * target.each_bytes
    return others_bytes + last_bytes > left_bytes


def kept_by_others(name: str, claims: Mapping[str, Claim], budget_bytes: int) -> int:
    """What pinned deployments other than this one keep."""
    misfits = too_large(claims.values(), budget_bytes)
    return sum(
        one.need_bytes * max(one.least, 1)
        for one in claims.values()
        if one.pinned and one.name != name and one.name not in misfits
    )


def least_wanted(wish: Wish) -> int:
    """The fewest replicas that the deployment can want: at a quieter moment, what is too much now
    may fit."""
    return min(wish.wanted, max(wish.sized.spec.min_replicas, 1))


def least_beside(size: int, wish: Wish) -> int:
    """Of a target that is to have ``size`` replicas now, as many as it has at the very least when
    the fewest are wanted."""
    return 1 + (size - 1) * least_wanted(wish) // max(wish.wanted, 1)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What one replica takes on this machine, bytes: of the target, and of the stable revision
    (None: that does not run here beside it)."""

    target_bytes: int
    stable_bytes: int | None = None


def is_moving(wish: Wish) -> bool:
    """Whether its roll-out has a target beside what runs."""
    stable, deployment = wish.moving.stable, wish.deployment
    return bool(stable) and stable != deployment.revision and not deployment.deleting


def why_never(wish: Wish, sizes: Sizes, claims: Mapping[str, Claim], budget_bytes: int) -> str:
    """Why the replicas that a roll-out wants of its target can never be in this machine's memory;
    empty if they can, or if none is under way."""
    moving, spec = wish.moving, wish.deployment.spec
    if not is_moving(wish):
        return ""
    kept_bytes = kept_by_others(wish.name, claims, budget_bytes)
    stable = None
    if moving.size is not None and sizes.stable_bytes is not None:
        stable = Side(moving.stable, least_wanted(wish), sizes.stable_bytes)
    alone = max(spec.min_replicas, 1) if spec.pinned else 1
    beside = alone if moving.size is None else least_beside(moving.size, wish)
    target = Side(wish.deployment.revision, beside, sizes.target_bytes)
    if not never_fits(target, stable, budget_bytes - kept_bytes):
        return ""
    with_it = "" if stable is None else f" beside {stable}"
    kept = f", of which pinned deployments keep {amount_text(kept_bytes)}" if kept_bytes else ""
    return (
        f"{target} {NEVER}{with_it}: the budget (control.memory_budget) is "
        f"{amount_text(budget_bytes)}{kept}"
    )
