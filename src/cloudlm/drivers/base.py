"""The driver contract.

A driver runs *groups* of alike replicas somewhere. Its verbs speak of groups, because managed
platforms own their replicas. Every verb is idempotent and returns at once: "not yet" is an answer
that the next ``observe`` corrects. A driver raises only errors of ``core.errors``; one replica's
fault is a state in the observation, not an exception.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from cloudlm.core.clock import Clock
from cloudlm.core.deployment import GroupObservation, GroupSpec


class Ability(StrEnum):
    """What a driver can do; control asks for words, not for classes."""

    REPLICA_LOGS = "replica_logs"
    PER_REPLICA_ADDRESS = "per_replica_address"
    RESTARTS_REPLICAS = "restarts_replicas"
    STOPS_ONE_REPLICA = "stops_one_replica"
    KEEPS_RUNNING = "keeps_running"
    """Deleting a group stops nothing there: requests under way go on."""
    ONLY_HERE = "only_here"
    """Only a control on this machine, with this home, sees and orders the replicas."""
    THIS_MACHINE = "this_machine"
    """Replicas take memory of the machine that control runs on (``control.memory_budget``)."""


@dataclass(frozen=True, slots=True)
class DriverContext:
    """What every driver is built from. Drivers take their own settings from ``environment``.

    ``home`` is the installation's folder; ``worker_environment`` is what each replica must be
    given (home, registry address, worker token); ``worker_token`` opens a replica's API.
    """

    home: Path
    clock: Clock
    environment: dict[str, str]
    worker_environment: dict[str, str]
    first_port: int = 8100


class Driver(Protocol):
    """Runs groups. Built as ``DriverClass(context: DriverContext)`` inside a running event loop."""

    name: str
    abilities: frozenset[Ability]

    def fence(self, token: int) -> None:
        """Orders that are given from now on carry this token, that of the lease of whoever gives
        them. Where a driver can, it notes the greatest token beside what it runs; ``apply``,
        ``stop_replica`` and ``delete`` with a smaller one raise Superseded and change nothing.
        Without a call the token is 0."""
        ...

    async def groups(self) -> list[str]:
        """Names of all groups that exist here, also those of an earlier process."""
        ...

    async def observe(self, name: str) -> GroupObservation:
        """The group as it is now; without spec and replicas if it does not exist."""
        ...

    async def apply(self, spec: GroupSpec) -> None:
        """Make the group exist with ``spec.replicas`` copies.

        A second call with an equal spec changes nothing. A call that differs in ``replicas`` only
        starts or stops copies (the newest are stopped first); any other difference raises Conflict,
        because a revision's group never changes what it runs.
        """
        ...

    async def stop_replica(self, name: str, replica: str) -> None:
        """Kill one replica so that it is started anew (it stalled). Unknown ones are ignored.
        Only with the ability STOPS_ONE_REPLICA."""
        ...

    async def delete(self, name: str) -> None:
        """Stop all copies and forget the group. A group that does not exist is no error."""
        ...

    def logs(
        self, name: str, *, replica: str | None = None, tail: int = 100, follow: bool = False
    ) -> AsyncIterator[str]:
        """Lines of the replicas' output, oldest first, each without its newline and prefixed with
        nothing; of all replicas if ``replica`` is None. Ends at once unless ``follow``."""
        ...

    async def close(self) -> None:
        """Let go of resources. Leaves the replicas running."""
        ...
