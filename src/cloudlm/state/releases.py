"""The part of the state contract that holds revisions and roll-outs, and its rules as pure
functions that both twins apply. No I/O."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from cloudlm.core.deployment import Deployment
from cloudlm.core.errors import Conflict, NotFound
from cloudlm.core.rollout import HISTORY_KEPT, Outcome, Revision, Rollout
from cloudlm.core.tenant import LedgerRow


class ReleaseState(Protocol):
    """Revisions of deployments and where their roll-outs stand. A revision is noted by the very
    write that makes it (``put_deployment``); the last HISTORY_KEPT are kept, and always the one
    that is asked for and the one that answers. All of it goes with its deployment."""

    async def list_revisions(self, name: str) -> list[Revision]:
        """Newest first."""
        ...

    async def fix_revision(
        self, name: str, number: int, *, model: str, adapters: Mapping[str, str]
    ) -> None:
        """Note which fixed versions a revision runs. What was noted before stays."""
        ...

    async def end_revision(
        self, name: str, number: int, outcome: Outcome, *, reason: str, now: float
    ) -> None:
        """Note what became of a revision. Without effect if there is none."""
        ...

    async def return_to(
        self,
        name: str,
        number: int,
        *,
        reason: str,
        now: float,
        expected_generation: int | None = None,
    ) -> Deployment:
        """Ask again for what an earlier revision ran (``Deployment.returned``), and note why the
        present one was rolled back, in one write. Changes nothing if it is asked for already.

        NotFound if the deployment or revision is not there; Conflict if the deployment is being
        deleted or at another generation.
        """
        ...

    async def add_scores(
        self, name: str, number: int, *, count: int, total: float
    ) -> Revision | None:
        """Add ``count`` scores that sum up to ``total``; None if there is no such revision."""
        ...

    async def get_rollout(self, name: str) -> Rollout | None: ...

    async def list_rollouts(self) -> list[Rollout]:
        """Sorted by name."""
        ...

    async def put_rollout(self, wanted: Rollout, *, replaces: Rollout | None) -> None:
        """Keep where a roll-out stands. ``replaces`` is what the caller has read: if it is not
        what is stored, or there is no such deployment, the write is refused with Conflict."""
        ...

    async def latest_attempts(self, group: str, *, since: float, limit: int) -> list[LedgerRow]:
        """Ledger rows of attempts at the replicas of a group, begun at ``since`` or later: at most
        ``limit``, newest first."""
        ...


def first_note(deployment: Deployment, by: str) -> Revision:
    """What is noted of a revision when it is made."""
    return Revision(
        deployment.revision,
        deployment.spec,
        created_at=deployment.updated_at or deployment.created_at,
        by=by,
    )


def forgotten(numbers: Collection[int], needed: Collection[int]) -> list[int]:
    """The revisions to forget; ``needed`` are kept however old."""
    newest = sorted(numbers, reverse=True)
    return [one for one in newest[HISTORY_KEPT:] if one not in needed]


def ended(revision: Revision, outcome: Outcome, reason: str, now: float) -> Revision:
    """The revision after ``end_revision``."""
    return replace(revision, outcome=outcome, reason=reason, ended_at=now)


def fixed(revision: Revision, model: str, adapters: Mapping[str, str]) -> Revision:
    """The revision after ``fix_revision``."""
    return revision if revision.model else replace(revision, model=model, adapters=dict(adapters))


def scored(revision: Revision, count: int, total: float) -> Revision:
    """The revision after ``add_scores``."""
    return replace(
        revision, scores=revision.scores + count, score_total=revision.score_total + total
    )


def returning(
    name: str,
    current: Deployment | None,
    revisions: Sequence[Revision],
    number: int,
    reason: str,
    now: float,
    expected_generation: int | None,
) -> tuple[Deployment, list[Revision]]:
    """The deployment after ``return_to``, and the revisions that it changes; ``current`` itself
    and none if nothing changes."""
    if current is None:
        raise NotFound(f"deployment {name[:80]!r} does not exist")
    if current.deleting:
        raise Conflict(f"deployment {name!r} is being deleted")
    if expected_generation not in (None, current.generation):
        raise Conflict(
            f"deployment {name!r} is at generation {current.generation}, not "
            f"{expected_generation}: it changed meanwhile; read it again"
        )
    if number == current.revision:
        return current, []
    known = {one.number: one for one in revisions}
    if number not in known:
        raise NotFound(
            f"deployment {name!r} has no revision {number} in its history; "
            f"'cloudlm rollout history {name}' shows those that it has"
        )
    changed: list[Revision] = []
    if current.revision in known:
        changed.append(ended(known[current.revision], Outcome.ROLLED_BACK, reason, now))
    if known[number].outcome is not Outcome.PROMOTED:  # it is tried again
        changed.append(ended(known[number], Outcome.PENDING, "", 0.0))
    return current.returned(known[number].spec, number, now), changed


def check_rollout_replaced(stored: Rollout | None, replaces: Rollout | None, name: str) -> None:
    """Raise Conflict unless ``replaces`` is what is stored."""
    if stored != replaces:
        raise Conflict(f"the roll-out of {name!r} moved meanwhile; look at it again")


def no_deployment(name: str) -> Conflict:
    return Conflict(f"deployment {name[:80]!r} does not exist; it has no roll-out")


def around_group(group: str) -> tuple[str, str]:
    """The ids of a group's replicas lie between these texts, the second left out, where texts are
    sorted by code point. Few others do; ``in_group`` knows them."""
    return f"{group}-0", f"{group}-:"


def in_group(group: str, replica: str) -> bool:
    """Whether a replica has an id of this group (``drivers.groups.replica_ids``)."""
    number = replica.removeprefix(f"{group}-")
    return number != replica and number.isdigit()
