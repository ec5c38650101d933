"""The audit log in this process's memory; see ``state.audit.AuditState``."""

from __future__ import annotations

from collections.abc import Sequence

from cloudlm.core.audit import AuditEvent, AuditHead, AuditRecord, Checkpoint, chained


class MemoryAudit:
    """The audit log of ``MemoryState``."""

    def __init__(self) -> None:
        super().__init__()
        self._audit: list[AuditRecord] = []
        self._checkpoints: dict[int, Checkpoint] = {}

    async def append_audit(self, events: Sequence[AuditEvent]) -> AuditHead:
        self._audit.extend(chained(await self.audit_head(), events))
        return await self.audit_head()

    async def list_audit(
        self, *, after: int = 0, limit: int = 1000, tenant: str | None = None
    ) -> list[AuditRecord]:
        found = [
            one for one in self._audit if one.seq > after and tenant in (None, one.event.tenant)
        ]
        return found[: max(limit, 0)]

    async def audit_head(self) -> AuditHead:
        return AuditHead(self._audit[-1].seq, self._audit[-1].hash) if self._audit else AuditHead()

    async def put_checkpoint(self, checkpoint: Checkpoint) -> None:
        self._checkpoints[checkpoint.seq] = checkpoint

    async def list_checkpoints(self) -> list[Checkpoint]:
        return [self._checkpoints[seq] for seq in sorted(self._checkpoints)]
