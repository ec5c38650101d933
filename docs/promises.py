"""What cloudlm withstands, joined with the tests that show it.

The rows are written in ``promises.yaml``; which test shows which row is said by the test, with the
markers ``promise`` and ``known_failure``. They are read out of the test files without running them,
so that the page needs no test's dependencies. Must not judge whether a test shows what it says.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

ROOT = Path(__file__).parents[1]
MARKERS = ("promise", "known_failure")
OURS = ("access", "engine", "elastic")
"""Who must have a test for each of their rows."""


@dataclass(frozen=True, slots=True)
class Promise:
    """One row. ``left`` is what no test shows yet, ``bench`` where full numbers are measured."""

    number: int
    of: str
    fault: str
    expected: str
    bench: tuple[str, ...] = ()
    left: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """What failed elsewhere, by the ids under which it is known there."""

    ids: tuple[str, ...]
    what: str
    left: str = ""


@dataclass(slots=True)
class Table:
    """Everything that is promised, and the tests by row and by id (``path::name``)."""

    promises: list[Promise]
    failures: list[Failure]
    vulnerabilities: list[Failure]
    tests: dict[int | str, list[str]] = field(default_factory=dict)

    @property
    def known(self) -> set[int | str]:
        """The rows and ids that a marker may name."""
        named = (one for row in [*self.failures, *self.vulnerabilities] for one in row.ids)
        return {row.number for row in self.promises} | set(named)

    def unshown(self) -> list[str]:
        """What should have a test and has none."""
        tests = self.tests
        bare = [
            f"promise {row.number}"
            for row in self.promises
            if row.number not in tests and (row.of in OURS or not row.left)
        ]
        others = [*self.failures, *self.vulnerabilities]
        bare += [one for row in others if not row.left for one in row.ids if one not in tests]
        return bare


def read_table() -> Table:
    """The rows with their tests. Raises KeyError or TypeError for a row that is not well-formed."""
    raw = yaml.safe_load((ROOT / "docs" / "promises.yaml").read_text("utf-8"))
    table = Table(
        [
            Promise(number, **{**row, "bench": tuple(row.get("bench", ()))})
            for number, row in raw["rows"].items()
        ],
        [_failure(row) for row in raw["failures"]],
        [_failure(row) for row in raw["vulnerabilities"]],
    )
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        where = path.relative_to(ROOT).as_posix()
        for name, mark in marks_in(path.read_text("utf-8")):
            table.tests.setdefault(mark, []).append(f"{where}::{name}")
    return table


def _failure(row: dict[str, Any]) -> Failure:
    return Failure(tuple(row["ids"]), row["what"], row.get("left", ""))


def marks_in(source: str) -> Iterator[tuple[str, int | str]]:
    """Every test of a file with every row or id that it names."""
    tree = ast.parse(source)
    yield from _marks(tree.body, "", ())


def _marks(
    body: list[ast.stmt], prefix: str, outer: tuple[int | str, ...]
) -> Iterator[tuple[str, int | str]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _marks(node.body, f"{prefix}{node.name}::", (*outer, *_named(node)))
        elif _is_test(node):
            for mark in (*outer, *_named(node)):
                yield prefix + node.name, mark


def _is_test(node: ast.stmt) -> TypeGuard[ast.FunctionDef | ast.AsyncFunctionDef]:
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return function and node.name.startswith("test")


def _named(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[int | str]:
    """What a test's own decorators name."""
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and _is_marker(decorator.func):
            yield from (ast.literal_eval(argument) for argument in decorator.args)


def _is_marker(function: ast.expr) -> bool:
    return ast.unparse(function) in [f"pytest.mark.{marker}" for marker in MARKERS]


def page() -> str:
    """The page, without the note that it is generated."""
    table = read_table()
    lines = [
        "# What is withstood, and the tests that show it\n\n",
        "One row per fault or attack, the most important first. A test names its row with the ",
        "marker `promise(number)`; `pytest` runs those that are listed here like any other. What ",
        "no test shows is said under *not yet shown*.\n",
    ]
    for row in table.promises:
        lines.append(f"\n## {row.number}. {_sentence(row.fault)}\n\n{_sentence(row.expected)}.\n")
        lines.extend(_tests(table.tests.get(row.number, [])))
        if row.bench:
            lines.append(f"\nMeasured by {', '.join(f'`{name}`' for name in row.bench)}.\n")
        if row.left:
            lines.append(f"\n*Not yet shown:* {row.left}.\n")
    for title, rows in (
        ("Known failures of other systems", table.failures),
        ("Known vulnerabilities of other systems", table.vulnerabilities),
    ):
        lines.append(f"\n## {title}\n\nMarker `known_failure(id)`.\n")
        for one in rows:
            lines.append(f"\n**{', '.join(one.ids)}**: {one.what}.\n")
            named = (test for name in one.ids for test in table.tests.get(name, []))
            lines.extend(_tests(list(dict.fromkeys(named))))
            if one.left:
                lines.append(f"\n*Not yet shown:* {one.left}.\n")
    return "".join(lines)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _tests(names: list[str]) -> Iterator[str]:
    if names:
        yield "\n"
    yield from (f"- `{name}`\n" for name in names)
