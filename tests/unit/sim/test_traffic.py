"""Traffic: traces are read as they are, faults of a file are told, drawn traffic has its law."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.tenant import LedgerRow, Outcome
from cloudlm.sim.traces import READERS, ledger_csv
from cloudlm.sim.traffic import (
    PATTERNS,
    Arrival,
    Conversations,
    Hot,
    Lengths,
    diurnal,
    drawn,
    gamma,
    poisson,
    quicker,
)


def written(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


def test_azure_counts_from_its_first_request(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
    )
    first, second = READERS["azure"](written(tmp_path, text))
    assert first == Arrival(0.0, 374, 44)
    assert second.at == pytest.approx(4.314579, abs=1e-5)


def test_mooncake_keeps_whole_blocks_only(tmp_path: Path) -> None:
    line = '{"timestamp": 3000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}\n'
    (one,) = READERS["mooncake"](written(tmp_path, line + "\n"))
    assert one == Arrival(3.0, 1100, 5, (7, 8), 512)


def row(number: int, at: float, **more: object) -> LedgerRow:
    values = {
        "id": str(number),
        "request_id": str(number),
        "attempt": 1,
        "tenant": "acme",
        "key_id": "k",
        "model": "m",
        "replica": "r",
        "outcome": Outcome.FINISHED,
        "status": 200,
        "prompt_tokens": 1000,
        "completion_tokens": 20,
        "cached_tokens": 0,
        "started_at": at,
        "duration_s": 1.0,
    }
    return LedgerRow(**{**values, **more})  # type: ignore[arg-type]


def test_a_ledger_is_written_and_replayed(tmp_path: Path) -> None:
    rows = [
        row(2, 1010.0, cached_tokens=600),
        row(1, 1000.0),
        row(3, 1011.0, attempt=2),
        row(4, 1012.0, outcome=Outcome.CACHED),
        row(5, 1015.0, cached_tokens=600, tenant="other"),
    ]
    lines: list[str] = []
    assert ledger_csv(rows, lines.append) == 5
    text = "".join(lines)
    assert "k" not in text.splitlines()[1].split(",")  # no key leaves
    first, second, third = READERS["ledger"](written(tmp_path, text))
    assert (first.at, second.at, third.at) == (0.0, 10.0, 15.0)
    assert first.tenant == "acme"
    assert len(second.blocks) == 600 // second.block_tokens + 1
    assert not set(second.blocks) & set(third.blocks)  # tenants share nothing


@pytest.mark.parametrize(
    ("reader", "text", "says"),
    [
        ("azure", "TIMESTAMP,ContextTokens\n", "no column GeneratedTokens"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "line 2: TIMESTAMP"),
        (
            "azure",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,x,1\n",
            "line 2: ContextTokens 'x'",
        ),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16\n", "line 2: too few"),
        ("mooncake", '{"timestamp": 1}\n', "line 1"),
        ("mooncake", "no json\n", "hash_ids, as Mooncake"),
        ("ledger", "a,b\n", "no column"),
    ],
)
def test_a_broken_trace_is_named(tmp_path: Path, reader: str, text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        list(READERS[reader](written(tmp_path, text)))


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="nowhere"):
        list(READERS["azure"](tmp_path / "nowhere"))


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_has_its_rate_and_burstiness(cv: float) -> None:
    moments = list(gamma(Random(1), 50.0, cv, 2000.0))
    gaps = [b - a for a, b in pairwise(moments)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.02, rel=0.05)
    assert deviation / mean == pytest.approx(cv, rel=0.05)


def test_a_day_swings() -> None:
    moments = list(diurnal(Random(1), 10.0, 0.8, 1000.0, 1000.0))
    night = sum(at < 250 or at >= 750 for at in moments)
    assert len(moments) == pytest.approx(10_000, rel=0.05)
    # The share of a cosine's lower half: 1/2 - swing / pi.
    assert night / len(moments) == pytest.approx(0.5 - 0.8 / 3.14159, abs=0.02)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_patterns_are_the_same_from_the_same_seed(name: str) -> None:
    def draw() -> list[Arrival]:
        prefixes = PATTERNS[name](Random(2), 64)
        moments = poisson(Random(1), 5.0, 20.0)
        return list(drawn(moments, Random(3), Lengths(500), Lengths(50), prefixes, ("a", "b")))

    assert draw() == draw()
    assert all(one.prompt_tokens > len(one.blocks) * one.block_tokens for one in draw())


def test_a_hot_beginning_is_shared_and_nothing_else() -> None:
    prefixes = Hot(Random(1), 256, tokens=1024)
    first, second = prefixes.next(600)[0], prefixes.next(600)[0]
    assert first[:4] == second[:4]
    assert not set(first[4:]) & set(second[4:])


def test_a_conversation_repeats_what_was_said() -> None:
    prefixes = Conversations(Random(1), 256, count=1, turns=1e9)
    said, session = prefixes.next(300)
    for _ in range(5):
        more, same = prefixes.next(300)
        assert more[: len(said)] == said
        assert same == session
        assert len(more) > len(said)
        said = more


def test_a_quicker_trace_is_the_same_closer_together() -> None:
    one = Arrival(10.0, 5, 6)
    assert list(quicker(iter([one]), 4.0)) == [Arrival(2.5, 5, 6)]
