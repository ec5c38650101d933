"""Checks the audit log and signs where it ends.

``Checker`` walks the chain record by record and names the first that is wrong; checkpoints signed
with the installation's Ed25519 key, of which copies belong outside the database, show a cut tail
and a log that was written anew. ``Flood`` bounds how many refusals are written down. No I/O.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cloudlm.core.audit import GENESIS, AuditHead, AuditRecord, Checkpoint, record_hash
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import Fields

_WORD = "cloudlm-audit-checkpoint-1"


def sign(head: AuditHead, at: float, seed: bytes) -> Checkpoint:
    """A checkpoint of ``head``. ``seed`` is the 32 secret bytes of the installation's key."""
    key = Ed25519PrivateKey.from_private_bytes(seed)
    return Checkpoint(head.seq, head.hash, at, key.sign(_statement(head.seq, head.hash, at)).hex())


def public_key(seed: bytes) -> str:
    """The public half of the installation's key, hex: what a verifier elsewhere needs."""
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw().hex()


def is_signed(checkpoint: Checkpoint, public: str) -> bool:
    """Whether a checkpoint was signed by the holder of this key. Raises InvalidRequest for a text
    that is no public key."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
    except ValueError:
        raise InvalidRequest(
            "the public key must be 64 hex digits, as 'cloudlm audit key' prints it"
        ) from None
    try:
        statement = _statement(checkpoint.seq, checkpoint.hash, checkpoint.at)
        key.verify(bytes.fromhex(checkpoint.signature), statement)
    except (InvalidSignature, ValueError):
        return False
    return True


def _statement(seq: int, digest: str, at: float) -> bytes:
    return json.dumps([_WORD, seq, digest, at]).encode()


def checkpoint_line(checkpoint: Checkpoint) -> str:
    """A checkpoint as one line of JSON."""
    fields = {"seq": checkpoint.seq, "hash": checkpoint.hash, "at": checkpoint.at}
    return json.dumps({**fields, "signature": checkpoint.signature})


def read_checkpoint(line: str) -> Checkpoint:
    """A checkpoint out of its line. Raises InvalidRequest."""
    try:
        body: Any = json.loads(line)
    except ValueError:
        raise InvalidRequest("a checkpoint is a line of JSON; this is none") from None
    fields = Fields(body, "a checkpoint")
    return Checkpoint(
        fields.integer("seq"),
        fields.text("hash"),
        fields.number("at"),
        fields.text("signature", max_length=200),
    )


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a log, and the number of the first record that shows it."""

    seq: int
    problem: str


class Checker:
    """Walks a log from its first record. Feed it with ``see``, then ask ``end``."""

    def __init__(self, checkpoints: Iterable[Checkpoint], public: str) -> None:
        self._checkpoints: dict[int, list[Checkpoint]] = {}
        self._forged: list[Checkpoint] = []
        for one in checkpoints:
            if is_signed(one, public):
                self._checkpoints.setdefault(one.seq, []).append(one)
            else:
                self._forged.append(one)
        self.head = AuditHead(0, GENESIS)
        self.finding: Finding | None = None
        self.checked = 0

    def see(self, records: Iterable[AuditRecord]) -> bool:
        """Look at the next records in order; False when a bad one was found."""
        for record in records:
            if self.finding is None:
                self.finding = self._look(record)
        return self.finding is None

    def end(self, head: AuditHead) -> Finding | None:
        """The first thing that is wrong, None for a whole log. ``head`` is the end of the chain as
        the state noted it beside the records."""
        if self.finding is not None:
            return self.finding
        seen = self.head
        beyond = sorted(seq for seq in self._checkpoints if seq > seen.seq)
        if beyond:
            return Finding(
                seen.seq + 1,
                f"the tail is cut: the log ends at {seen.seq}, but a signed checkpoint knows "
                f"record {beyond[-1]}",
            )
        if seen.seq < head.seq:
            return Finding(seen.seq + 1, f"the tail is cut: {head.seq} records were written")
        if seen != head:
            return Finding(seen.seq, "the noted end of the chain does not fit its last record")
        if self._forged:
            one = self._forged[0]
            return Finding(one.seq, f"a checkpoint of record {one.seq} has a wrong signature")
        return None

    def _look(self, record: AuditRecord) -> Finding | None:
        expected = self.head.seq + 1
        if record.seq != expected:
            what = "is missing" if record.seq > expected else "is there twice or out of order"
            return Finding(expected, f"record {min(expected, record.seq)} {what}")
        if record.previous != self.head.hash:
            return Finding(record.seq, "does not follow the record before it")
        if record.hash != record_hash(record.seq, record.previous, record.event):
            return Finding(record.seq, "was changed: its hash does not fit its content")
        for one in self._checkpoints.get(record.seq, ()):
            if one.hash != record.hash:
                return Finding(
                    record.seq, "the log was written anew: a signed checkpoint knows another record"
                )
        self.head = AuditHead(record.seq, record.hash)
        self.checked += 1
        return None


class Flood:
    """Lets ``per_s`` events a second through, ``burst`` at once, and counts the others."""

    def __init__(self, per_s: float = 5.0, burst: float = 50.0) -> None:
        self._per_s = per_s
        self._burst = burst
        self._left = burst
        self._at: float | None = None
        self._passed_over = 0

    def take(self, now: float) -> int | None:
        """None if this one is not to be written; else how many were passed over since the last
        that was. ``now`` is monotonic seconds."""
        since = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        self._left = min(self._burst, self._left + since * self._per_s)
        if self._left < 1.0:
            self._passed_over += 1
            return None
        self._left -= 1.0
        passed_over, self._passed_over = self._passed_over, 0
        return passed_over


def flood_note(passed_over: int) -> str:
    """What a record says of the refusals that were not written before it."""
    return f"and {passed_over} more that were not recorded" if passed_over else ""


def record_body(record: AuditRecord) -> Mapping[str, Any]:
    """A record as JSON: what is exported, and what a verifier elsewhere reads."""
    from dataclasses import asdict

    return {"seq": record.seq, **asdict(record.event), "previous": record.previous} | {
        "hash": record.hash
    }
