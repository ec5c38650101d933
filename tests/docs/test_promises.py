"""Every promise has a test that names its row, and every test names a row that there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from docs.promises import OURS, marks_in, read_table

ROOT = Path(__file__).parents[2]
ACCESS = {*range(1, 11), 15, 18, *range(22, 25), *range(26, 29), *range(31, 37), *range(38, 43)}
ENGINE = {11, 12, 13, 14, 21}
ELASTIC = {19, 20, 25, 29, 30, 37}


def test_every_promise_of_ours_has_a_test() -> None:
    assert read_table().unshown() == [], "mark a test, or say in docs/promises.yaml what is left"


def test_no_test_names_a_row_that_is_not_there() -> None:
    table = read_table()
    assert set(table.tests) - table.known == set()


def test_rows_are_complete_and_belong_to_who_promised_them() -> None:
    rows = read_table().promises
    assert [row.number for row in rows] == list(range(1, 45))
    assert {row.number for row in rows if row.of in OURS} == ACCESS | ENGINE | ELASTIC
    assert all((ROOT / bench).is_file() for row in rows for bench in row.bench)


def test_ids_are_named_once() -> None:
    table = read_table()
    ids = [one for row in [*table.failures, *table.vulnerabilities] for one in row.ids]
    assert len(ids) == len(set(ids))


def test_a_row_without_a_test_is_found() -> None:
    table = read_table()
    del table.tests[2], table.tests["litellm#27955"]
    assert table.unshown() == ["promise 2", "litellm#27955"]


def test_markers_are_read_out_of_functions_methods_and_classes() -> None:
    source = """
import pytest

@pytest.mark.promise(1)
class TestOne:
    @pytest.mark.promise(2, 3)
    @pytest.mark.known_failure("a#1")
    async def test_it(self): ...
    def helper(self): ...

@pytest.mark.parametrize("x", [7])
def test_two(x): ...
"""
    assert list(marks_in(source)) == [
        ("TestOne::test_it", 1),
        ("TestOne::test_it", 2),
        ("TestOne::test_it", 3),
        ("TestOne::test_it", "a#1"),
    ]


@pytest.mark.parametrize("number", [1, 8, 40])
def test_the_page_shows_row_and_tests(number: int) -> None:
    page = (ROOT / "docs" / "reference" / "promises.md").read_text("utf-8")
    assert f"\n## {number}. " in page
    assert read_table().tests[number][0] in page
