"""Ledger rows on disk until the state has them: append-only JSON lines in small segments. A line is
the row's fields in their order, in a list that begins with whether the attempt is *open*.

A row is handed to the operating system as soon as its attempt ends, so that killing the process
loses none; it is forced to the disk when the state is away and the row must wait. An attempt that
is still running stands there too, as an *open* line with what it has relayed so far; if its process
dies, the last such line becomes its row. Each process writes segments of its own under a lock and
adopts those of dead processes at its start. Must not know the state.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections import deque
from pathlib import Path
from typing import Any, Final

import msgspec

from cloudlm.core.errors import StorageFailed
from cloudlm.core.tenant import LedgerRow
from cloudlm.telemetry.logs import get_logger

MAX_SEGMENT_BYTES = 8 * 1024 * 1024
MAX_WAITING_BYTES = 512 * 1024 * 1024

_log = get_logger(__name__)


class _Line(msgspec.Struct):
    row: LedgerRow
    open: bool = False


_FIELDS = LedgerRow.__struct_fields__
_decoder = msgspec.json.Decoder(list[Any])
_named_decoder = msgspec.json.Decoder(_Line)
_encode: Final = msgspec.json.Encoder().encode
_values: Final = msgspec.structs.astuple


def _read(text: bytes) -> _Line:
    """One line. An object with the row's fields by name is what earlier versions left. Raises
    MsgspecError and UnicodeDecodeError for what is none, as what a crash broke off."""
    if text.startswith(b"{"):
        return _named_decoder.decode(text)
    is_open, values = msgspec.convert(_decoder.decode(text), tuple[bool, list[Any]])
    named = dict(zip(_FIELDS, values, strict=False))  # later versions may have more fields
    return _Line(msgspec.convert(named, LedgerRow), is_open)


class Journal:
    """The segments of one process in ``folder``. A disk that takes no row is no error."""

    def __init__(self, folder: Path, *, max_waiting_bytes: int = MAX_WAITING_BYTES) -> None:
        self._folder = folder
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._max_waiting_bytes = max_waiting_bytes
        self._count = 0
        self._active: int | None = None
        self._active_path = folder
        self._active_bytes = 0
        self.active_rows = 0  # rows of attempts that have ended, in the current segment
        self._lock = -1
        self._waiting: deque[tuple[Path, int]] = deque()
        self._waiting_bytes = 0
        self._left: list[Path] = []  # in the state already, but the disk would not let go of them

    @property
    def waiting(self) -> list[Path]:
        """Sealed segments whose rows are not in the state yet, oldest first."""
        return [path for path, _ in self._waiting]

    @property
    def waiting_bytes(self) -> int:
        """Size of all rows on disk that the state does not have."""
        return self._active_bytes + self._waiting_bytes

    @property
    def active_bytes(self) -> int:
        """Size of the current segment."""
        return self._active_bytes

    def open(self) -> None:
        """Take a lock of our own and adopt the segments of dead processes. Raises StorageFailed."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = self._folder / f".{self._name}"
            self._lock = _locked(draft)  # held before others can see it
            draft.rename(self._folder / f"{self._name}.lock")
            for lock in sorted(self._folder.glob("*.lock")):
                if lock.stem != self._name:
                    self._adopt(lock)
            self._close_orphans()
        except OSError as error:
            raise StorageFailed(
                f"cannot keep the ledger's journal in {self._folder}: {error.strerror}. "
                "Make the folder writable, or give another home with CLOUDLM_HOME"
            ) from None

    def _adopt(self, lock: Path) -> None:
        try:
            held = _locked(lock)
        except OSError:
            return  # its process lives
        for segment in sorted(self._folder.glob(f"{lock.stem}.*.jsonl")):
            self._count += 1
            mine = self._folder / f"{self._name}.{self._count:08d}.jsonl"
            segment.rename(mine)
            self._queue(mine, mine.stat().st_size)
        lock.unlink(missing_ok=True)
        os.close(held)

    def _close_orphans(self) -> None:
        """Give each attempt that a dead process left open its row."""
        orphans: dict[str, LedgerRow] = {}
        ended: set[str] = set()
        for segment in self.waiting:
            for line in self._lines(segment):
                if line.open:
                    orphans[line.row.id] = line.row
                else:
                    ended.add(line.row.id)
        for row in orphans.values():
            if row.id not in ended:
                self.append(row)

    def append(self, row: LedgerRow, *, is_open: bool = False) -> bool:
        """Hand a row to the operating system; False if the disk does not take it."""
        line = _encode((is_open, _values(row))) + b"\n"
        size = len(line)
        if self._active_bytes + self._waiting_bytes + size > self._max_waiting_bytes:
            return False
        try:
            if self._active is None:
                self._begin_segment()
            assert self._active is not None
            written = os.write(self._active, line)
            if written != size:  # a full disk took half a line: end it, so the next is whole
                with contextlib.suppress(OSError):
                    os.ftruncate(self._active, self._active_bytes)
                return False
        except OSError:
            return False
        self._active_bytes += size
        self.active_rows += not is_open
        if self._active_bytes >= MAX_SEGMENT_BYTES:
            self.seal()
        return True

    def _begin_segment(self) -> None:
        self._count += 1
        self._active_path = self._folder / f"{self._name}.{self._count:08d}.jsonl"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._active = os.open(self._active_path, flags, 0o600)
        self._active_bytes = 0

    def seal(self) -> None:
        """End the current segment; the next row begins a new one."""
        if self._active is None:
            return
        # Gone even if ``close`` fails; its number may soon be that of another file or socket.
        descriptor, self._active = self._active, None
        with contextlib.suppress(OSError):
            os.close(descriptor)
        self._queue(self._active_path, self._active_bytes)
        self._active_bytes = self.active_rows = 0

    def _queue(self, segment: Path, size_bytes: int) -> None:
        self._waiting.append((segment, size_bytes))
        self._waiting_bytes += size_bytes

    def sync(self) -> None:
        """Force the current segment to the disk. Blocks; call it in a thread."""
        descriptor = self._active
        if descriptor is not None:
            with contextlib.suppress(OSError):  # the segment was sealed meanwhile
                os.fsync(descriptor)

    def read(self, segment: Path) -> list[LedgerRow]:
        """The rows of a sealed segment's ended attempts; a line broken by a crash is left out."""
        return [line.row for line in self._lines(segment) if not line.open]

    def _lines(self, segment: Path) -> list[_Line]:
        lines: list[_Line] = []
        try:
            texts = segment.read_bytes().split(b"\n")
        except FileNotFoundError:
            return lines
        for text in texts:
            if text:
                try:
                    lines.append(_read(text))
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    fields = {"segment": segment.name, "size_bytes": len(text)}
                    _log.warning("ledger_line_unreadable", extra={"fields": fields})
        return lines

    def forget(self, segments: list[Path]) -> None:
        """Remove sealed segments whose rows are in the state."""
        gone = set(segments)
        self._waiting = deque(entry for entry in self._waiting if entry[0] not in gone)
        self._waiting_bytes = sum(size for _, size in self._waiting)
        self._left = [one for one in (*self._left, *segments) if not _removed(one)]

    def close(self) -> None:
        """Give up the lock; without waiting rows nothing is left on disk. What could not be removed
        is replayed at the next start, which changes nothing: rows are idempotent."""
        self.seal()
        self.forget([])
        if self._lock >= 0:
            if not self._waiting and not self._left:
                _removed(self._folder / f"{self._name}.lock")
            descriptor, self._lock = self._lock, -1
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _removed(path: Path) -> bool:
    """Remove a file; False if the disk does not let it go."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _locked(path: Path) -> int:
    """A descriptor that holds the exclusive lock on ``path``. Raises BlockingIOError if held."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
