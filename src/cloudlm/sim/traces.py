"""Recorded traffic: readers of public traces and of one's own ledger, by path.

A file that does not read gives an InvalidRequest that names the file, the line and what was
expected. Times are counted from the first request. Must not draw or change anything.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.tenant import LedgerRow, Outcome
from cloudlm.sim.traffic import Arrival

MOONCAKE_BLOCK_TOKENS = 512
"""Qin et al., "Mooncake", FAST 2025: what one hash id stands for."""
LEDGER_COLUMNS = (
    "started_at",
    "request_id",
    "attempt",
    "tenant",
    "model",
    "outcome",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "first_token_s",
    "duration_s",
)
"""What a ledger as CSV holds: no text of anybody, no key."""


class _Mooncake(msgspec.Struct):
    timestamp: float  # milliseconds
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def azure(path: Path) -> Iterator[Arrival]:
    """Azure's LLM inference traces (Patel et al., "Splitwise", ISCA 2024): columns TIMESTAMP,
    ContextTokens, GeneratedTokens."""
    first: float | None = None
    for row, where in _rows(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        at = _read(where, "TIMESTAMP", row["TIMESTAMP"], _moment)
        first = at if first is None else first
        prompt = _read(where, "ContextTokens", row["ContextTokens"], int)
        output = _read(where, "GeneratedTokens", row["GeneratedTokens"], int)
        yield Arrival(max(at - first, 0.0), max(prompt, 1), max(output, 1))


def mooncake(path: Path) -> Iterator[Arrival]:
    """Mooncake's traces (Qin et al., FAST 2025): JSON lines with timestamp (ms), input_length,
    output_length and hash_ids, which name beginnings of 512 tokens."""
    decoder = msgspec.json.Decoder(_Mooncake)
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidRequest(
                f"{path}, line {number}: {error}; expected an object with timestamp, input_length, "
                "output_length and hash_ids, as Mooncake's traces have"
            ) from None
        whole = max(row.input_length - 1, 0) // MOONCAKE_BLOCK_TOKENS
        yield Arrival(
            row.timestamp / 1000.0,
            max(row.input_length, 1),
            max(row.output_length, 1),
            row.hash_ids[:whole],  # the last id names a part of a block, which no cache keeps
            MOONCAKE_BLOCK_TOKENS,
        )


def ledger(path: Path) -> Iterator[Arrival]:
    """One's own ledger as ``cloudlm simulate --export-ledger`` writes it: first attempts, in
    order of time. Whose beginnings were alike is not in a ledger; tokens that came out of a cache
    are taken for one that the tenant's requests share."""
    found: list[tuple[float, int, int, str, int]] = []
    for row, where in _rows(path, LEDGER_COLUMNS[:9]):
        if _read(where, "attempt", row["attempt"], int) != 1:
            continue
        if row["outcome"] in (Outcome.CACHED, Outcome.SEMANTIC):
            continue  # answered without a replica
        at = _read(where, "started_at", row["started_at"], float)
        prompt = _read(where, "prompt_tokens", row["prompt_tokens"], int)
        output = _read(where, "completion_tokens", row["completion_tokens"], int)
        cached = _read(where, "cached_tokens", row["cached_tokens"], int)
        found.append((at, max(prompt, 1), max(output, 1), row["tenant"], min(cached, prompt)))
    found.sort()
    first = found[0][0] if found else 0.0
    marks: dict[tuple[str, int], int] = {}
    for number, (at, prompt, output, tenant, cached) in enumerate(found):
        blocks = _ledger_blocks(marks, tenant, cached // _LEDGER_BLOCK, number)
        yield Arrival(at - first, prompt, output, blocks, _LEDGER_BLOCK, tenant)


_LEDGER_BLOCK = 256


def _ledger_blocks(
    marks: dict[tuple[str, int], int], tenant: str, cached: int, number: int
) -> tuple[int, ...]:
    """The beginning that a request shared, and a block of its own behind it."""
    shared = tuple(marks.setdefault((tenant, n), len(marks)) for n in range(cached))
    return (*shared, -1 - number)


def ledger_csv(rows: Iterable[LedgerRow], write: Callable[[str], Any]) -> int:
    """Write ledger rows as CSV; returns how many."""
    writer = csv.writer(_Sink(write), lineterminator="\n")
    writer.writerow(LEDGER_COLUMNS)
    count = 0
    for row in rows:
        writer.writerow(["" if (v := getattr(row, n)) is None else v for n in LEDGER_COLUMNS])
        count += 1
    return count


class _Sink:
    def __init__(self, write: Callable[[str], Any]) -> None:
        self.write = write


READERS: Mapping[str, Callable[[Path], Iterator[Arrival]]] = {
    "azure": azure,
    "mooncake": mooncake,
    "ledger": ledger,
}


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[dict[str, str], str]]:
    """Rows of a CSV file that has at least these columns, and where each stands."""
    reader = csv.DictReader(_lines(path))
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise InvalidRequest(
            f"{path} has no column {', '.join(missing)}; its first line must name "
            f"{', '.join(columns)}"
        )
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if any(row[name] is None for name in columns):
            raise InvalidRequest(f"{where}: too few values; expected {', '.join(columns)}")
        yield row, where


def _lines(path: Path) -> Iterator[str]:
    """The file's lines, unpacked if it is called .gz."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"the trace {path} cannot be read: {reason}") from None


def _read(where: str, name: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not 0 <= value < 1e15:  # not-a-number fails here
        raise InvalidRequest(f"{where}: {name} {text[:40]!r} is no number from 0 up")
    return value


def _moment(text: str) -> float:
    """Seconds of '2023-11-16 18:15:46.6805900', whose last digit no clock of ours has."""
    whole, _, rest = text.partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{rest or 0}")
