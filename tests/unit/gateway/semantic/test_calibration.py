"""Thresholds out of labelled pairs: the interval, the budget, the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.errors import InvalidRequest
from cloudlm.gateway.semantic import calibration
from cloudlm.gateway.semantic.calibration import (
    Judged,
    choose,
    hits,
    interval,
)
from cloudlm.gateway.semantic.meaning import read
from cloudlm.gateway.semantic.pairs import (
    SAME,
    SHIPPED_APART,
    SHIPPED_PAIRS,
    Pair,
    read_pairs,
)
from cloudlm.gateway.semantic.vectors import built_in


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [  # from tables of the exact interval
        (0, 10, 0.0, 0.3085),
        (1, 10, 0.0025, 0.4450),
        (5, 10, 0.1871, 0.8129),
        (10, 10, 0.6915, 1.0),
        (2, 100, 0.0024, 0.0704),
        (0, 1000, 0.0, 0.0037),
    ],
)
def test_the_exact_interval(count: int, of: int, low: float, high: float) -> None:
    assert interval(count, of) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_holds_its_rate(seen: tuple[int, int]) -> None:
    low, high = interval(*seen)
    assert 0.0 <= low <= seen[0] / seen[1] <= high <= 1.0


_judged = st.lists(
    st.tuples(st.booleans(), st.floats(0, 1), st.booleans(), st.booleans()), max_size=300
)


def _of(kind: str, likeness: float, passes: bool = True, strict: bool = True) -> Judged:
    return Judged(Pair("a", "b", kind, 0), likeness, passes, strict and passes)


@given(_judged)
def test_a_choice_keeps_its_budget(found: list[tuple[bool, float, bool, bool]]) -> None:
    judged = [_of(SAME if same else "number", *rest) for same, *rest in found]
    judged += [_of("number", 0.0, False)] * 200 + [_of(SAME, 1.0)]
    try:
        choice = choose(judged, 0.05)
    except InvalidRequest:
        return
    false = sum(hits(one, choice) for one in judged if one.pair.kind != SAME)
    different = sum(one.pair.kind != SAME for one in judged)
    assert interval(false, different)[1] <= 0.05


def test_too_few_pairs_show_nothing() -> None:
    with pytest.raises(InvalidRequest, match="at least 368 are needed"):
        choose([_of("number", 0.1)] * 300 + [_of(SAME, 1.0)], 0.01)
    assert choose([_of("number", 0.1, False)] * 368 + [_of(SAME, 0.9)], 0.01).threshold == 0.9


def test_a_threshold_is_never_so_low_that_vectors_say_nothing() -> None:
    judged = [_of("number", 0.1, False)] * 368 + [_of(SAME, -0.2), _of(SAME, 0.7)]
    assert choose(judged, 0.01).threshold == 0.5


def test_an_embedder_that_tells_nothing_apart_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no threshold"):
        choose([_of("number", 1.0)] * 500 + [_of(SAME, 1.0)], 0.01)


def test_the_shipped_pairs_keep_the_usual_budget(tmp_path: Path) -> None:
    pairs = read_pairs(SHIPPED_PAIRS)
    vectors = {text: built_in(read(text)) for pair in pairs for text in pair[:2]}
    found = calibration.calibrate(
        pairs, lambda a, b: float(vectors[a] @ vectors[b]), 0.01, "built-in"
    )
    assert found.false_hit_high <= 0.01
    assert found.different_pairs > 900 and found.hits > 100
    calibration.write(found, tmp_path)
    assert calibration.load(tmp_path) == found


def test_promise_of_the_guide_on_pairs_that_nothing_was_made_with() -> None:
    pairs, apart = read_pairs(SHIPPED_PAIRS), read_pairs(SHIPPED_APART)
    assert not {text for pair in pairs for text in pair[:2]} & {
        text for pair in apart for text in pair[:2]
    }
    vectors = {text: built_in(read(text)) for pair in [*pairs, *apart] for text in pair[:2]}
    found = calibration.calibrate(
        pairs, lambda a, b: float(vectors[a] @ vectors[b]), 0.01, "built-in", (), apart
    )
    assert (found.false_hits, found.different_pairs) == (1, 580)
    assert found.false_hit_high < 0.01
    assert (found.hits, found.same_pairs) == (116, 171)


def test_a_rate_over_the_budget_is_refused() -> None:
    """Chosen where nothing is wrong, measured where all is."""
    good = [Pair(f"w{n} a", f"x{n} b", "number", n) for n in range(400)]
    good += [Pair("the book", "the book", SAME, n) for n in range(9)]
    bad = [Pair("the book", "the book", "number", n) for n in range(9)]
    with pytest.raises(InvalidRequest, match="9 of 9 pairs"):
        calibration.calibrate(good, lambda a, b: float(a == b), 0.01, "e", (), bad)


def test_files_that_are_none(tmp_path: Path) -> None:
    assert calibration.load(tmp_path) is None
    file = tmp_path / calibration.FILE_NAME
    for text in ("{", "[]", '{"embedder": 1}'):
        file.write_text(text)
        with pytest.raises(InvalidRequest, match="cloudlm cache calibrate"):
            calibration.load(tmp_path)


@pytest.mark.parametrize("text", ["= a\nwhat b", "a", "=", "number", "# only this"])
def test_pairs_that_are_none_name_their_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "pairs.txt"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=r"line \d|no pairs"):
        read_pairs(file)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_pairs(tmp_path / "nowhere")


def test_pairs_of_a_group(tmp_path: Path) -> None:
    file = tmp_path / "pairs.txt"
    file.write_text("= a\n= b\nnumber c\n\n\n= d\n= e\n")
    assert read_pairs(file) == [
        Pair("a", "b", SAME, 0),
        Pair("a", "c", "number", 0),
        Pair("b", "c", "number", 0),
        Pair("d", "e", SAME, 1),
    ]


def test_other_rules_have_another_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = calibration.rules()
    assert mark == calibration.rules()
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"other")
    assert calibration.rules() != mark


def test_facts_hold_no_vectors() -> None:
    found = calibration.Calibration("e", 0.9, True, 0.01, 0, 9, 0.0, 0.0, 0.1, 4, 8, 2, "r", (1.0,))
    assert calibration.facts(replace(found))["hit_rate"] == 0.5
    assert "fingerprint" not in calibration.facts(found)
