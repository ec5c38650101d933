"""The words of the audit log: who did what to which object, from where, and whether it was let.

Records are chained: each holds the hash of the one before, so that one that is edited, removed or
moved breaks the chain at its place. What the chain cannot show, a cut tail or a log written anew,
signed checkpoints do (``security.audit``). Never a prompt, an answer, a body or a secret. No I/O.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum

GENESIS = "0" * 64
"""What the first record follows."""
MAX_FIELD = 300


class AuditOutcome(StrEnum):
    """``begun`` is written before a change and ``done`` or ``failed`` after it: a change without an
    end was cut off by a crash. ``denied`` changed nothing."""

    BEGUN = "begun"
    DONE = "done"
    FAILED = "failed"
    DENIED = "denied"


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """Something that happened. ``actor`` is a principal's id, ``key_id`` the key it used;
    ``action`` the verb and kind, ``target`` the route or command with its names; ``source`` the
    address it came from; ``status`` the HTTP status, 0 if there is none yet."""

    at: float
    server: str
    actor: str
    key_id: str
    tenant: str
    action: str
    target: str
    source: str
    outcome: AuditOutcome
    status: int = 0
    request_id: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """An event at its place in the chain. ``seq`` counts from 1; hashes are SHA-256, hex."""

    seq: int
    event: AuditEvent
    previous: str
    hash: str


@dataclass(frozen=True, slots=True)
class AuditHead:
    """The end of the chain: the last record's number and hash."""

    seq: int = 0
    hash: str = GENESIS


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A signed statement of how the log ended at a moment. ``signature`` is Ed25519, hex."""

    seq: int
    hash: str
    at: float
    signature: str = ""


def record_hash(seq: int, previous: str, event: AuditEvent) -> str:
    """The hash of a record: over its number, the hash before and every field."""
    fields = [seq, previous, *asdict(event).values()]
    return hashlib.sha256(json.dumps(fields, ensure_ascii=True).encode()).hexdigest()


def chained(head: AuditHead, events: Iterable[AuditEvent]) -> list[AuditRecord]:
    """The records that follow ``head``."""
    records = []
    for event in events:
        seq = head.seq + 1
        record = AuditRecord(seq, event, head.hash, record_hash(seq, head.hash, event))
        records.append(record)
        head = AuditHead(seq, record.hash)
    return records


def kept(text: str) -> str:
    """A text as a record holds it: printable, of bounded length."""
    plain = "".join(char if char.isprintable() else "?" for char in text[:MAX_FIELD])
    return plain.encode("utf-8", "replace").decode()
