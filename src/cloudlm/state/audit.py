"""The part of the state contract that keeps the audit log: append-only, chained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cloudlm.core.audit import AuditEvent, AuditHead, AuditRecord, Checkpoint


class AuditState(Protocol):
    """The audit log. Nothing here changes or removes a record."""

    async def append_audit(self, events: Sequence[AuditEvent]) -> AuditHead:
        """Chain events to the end of the log, all in one write that no other writer can come
        between; the new end."""
        ...

    async def list_audit(
        self, *, after: int = 0, limit: int = 1000, tenant: str | None = None
    ) -> list[AuditRecord]:
        """Records with a greater number than ``after``, in order; those of one tenant if given."""
        ...

    async def audit_head(self) -> AuditHead:
        """The end of the chain as noted beside the records."""
        ...

    async def put_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Keep a signed checkpoint; one for the same record replaces the former."""
        ...

    async def list_checkpoints(self) -> list[Checkpoint]:
        """In the order of their records."""
        ...
