"""Control's side of the audit log: a record before and after every change, and signed checkpoints.

A change whose beginning cannot be recorded does not happen. Bodies are never seen here.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from starlette.types import Scope

from cloudlm.core.audit import AuditEvent, AuditOutcome, kept
from cloudlm.core.clock import Clock
from cloudlm.core.errors import CloudlmError
from cloudlm.core.tenant import KeyRecord
from cloudlm.security.audit import Flood, checkpoint_line, flood_note, sign
from cloudlm.security.keys import without_keys
from cloudlm.security.matrix import Holder, control_row
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

CHECKPOINT_INTERVAL_S = 10.0
_READING = frozenset(("GET", "HEAD", "OPTIONS"))
_log = get_logger(__name__)


class Auditor:
    """Writes the log and signs its end. ``checkpoints`` is a file apart from the state."""

    def __init__(self, state: State, clock: Clock, seed: bytes, checkpoints: Path) -> None:
        self.state = state
        self.clock = clock
        self.flood = Flood()
        self._seed = seed
        self._checkpoints = checkpoints
        self._signed = 0

    def deed(self, scope: Scope, request_id: str) -> Deed:
        """What a request is about to do."""
        return Deed(self, scope, request_id)

    async def checkpoint(self) -> None:
        """Sign the end of the log, if it moved. What fails is tried again next time."""
        try:
            head = await self.state.audit_head()
            if head.seq == self._signed:
                return
            signed = sign(head, self.clock.now(), self._seed)
            await self.state.put_checkpoint(signed)
            await asyncio.to_thread(_append_line, self._checkpoints, checkpoint_line(signed))
            self._signed = head.seq
        except (CloudlmError, OSError) as error:
            _log.warning("checkpoint_not_written", extra={"fields": {"reason": repr(error)}})

    async def run(self) -> None:
        """Sign every few seconds until cancelled."""
        while True:
            await self.clock.sleep(CHECKPOINT_INTERVAL_S)
            await self.checkpoint()


class Deed:
    """One request in the log. Reading is not recorded, unless it is refused."""

    def __init__(self, auditor: Auditor, scope: Scope, request_id: str) -> None:
        self._auditor = auditor
        self._scope = scope
        self._request_id = request_id
        self._begun = False

    async def begin(self) -> None:
        """Record that a change is let in. Raises Unavailable or StorageFailed: then it is not."""
        if self._scope["method"] not in _READING:
            await self._write(AuditOutcome.BEGUN, 0, "")
            self._begun = True

    async def end(self, status: int) -> None:
        """Record how it ended: a change, or a refusal of anything."""
        outcome, detail = AuditOutcome.DONE, ""
        if status in (401, 403) or (status == 404 and self._tenanted()):
            outcome = AuditOutcome.DENIED
        elif status >= 400:
            outcome = AuditOutcome.FAILED
        if not self._begun:
            if outcome is not AuditOutcome.DENIED:
                return
            passed_over = self._auditor.flood.take(self._auditor.clock.monotonic())
            if passed_over is None:
                return
            detail = flood_note(passed_over)
        try:
            await self._write(outcome, status, detail)
        except CloudlmError as error:  # the change is made; that it began is in the log
            _log.error("audit_end_not_written", extra={"fields": {"reason": error.message}})

    def _tenanted(self) -> bool:
        """Whether the path names an object: one that is not there for the caller."""
        found = control_row(self._scope["method"], self._scope["path"])
        return found is not None and found.row is not None and bool(found.names)

    async def _write(self, outcome: AuditOutcome, status: int, detail: str) -> None:
        method, path = self._scope["method"], self._scope["path"]
        found = control_row(method, path)
        row = None if found is None else found.row
        known = row is not None and row.holder is Holder.KEY
        caller = self._scope.get("state", {}).get("caller")
        key: KeyRecord | None = None if caller is None else caller.key
        client = self._scope.get("client")
        event = AuditEvent(
            at=self._auditor.clock.now(),
            server="control",
            actor=key.principal if key is not None else "",
            key_id=key.id if key is not None else "",
            tenant=key.tenant if key is not None else "",
            action=f"{row.verb} {row.resource}" if row is not None and known else "",
            target=kept(without_keys(f"{method} {path}")),
            source=kept(str(client[0])) if client else "",
            outcome=outcome,
            status=status,
            request_id=kept(without_keys(self._request_id)),
            detail=detail or self._made(),
        )
        await self._auditor.state.append_audit([event])

    def _made(self) -> str:
        """The id of what a route made, if it said so."""
        made = self._scope.get("state", {}).get("made", "")
        return kept(f"made {made}") if made else ""


def _append_line(path: Path, line: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, line.encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
