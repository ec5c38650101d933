"""No statement is built out of text that came from elsewhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cloudlm
from cloudlm.state.sql import _ledger_insert

RAW = {"text", "exec_driver_sql", "literal_column", "executescript", "DDL"}
"""What takes SQL as text."""
BUILDERS = {"_ledger_insert"}
"""Functions of ours that make a statement, which are tested here themselves."""
STATEMENT = re.compile(r"^\s*(select|insert|update|delete|drop|alter|create)\s", re.IGNORECASE)


def faults(source: str) -> Iterator[str]:
    """Where SQL is made of anything but a constant."""
    for node in _nodes(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            first = node.values[0] if node.values else None
            if isinstance(first, ast.Constant) and STATEMENT.match(str(first.value)):
                yield f"line {node.lineno}: a statement with values in its text"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if node.func.attr in RAW and _is_database(node.func.value):
                yield from _argument(node.args[0])
            if node.func.attr in ("execute", "executemany") and isinstance(
                node.args[0], ast.JoinedStr | ast.BinOp
            ):
                yield f"line {node.lineno}: executes a text that was put together"


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a tree but the inside of ``BUILDERS``."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if not (isinstance(node, ast.FunctionDef) and node.name in BUILDERS):
            yield node
            waiting.extend(ast.iter_child_nodes(node))


def _is_database(owner: ast.expr) -> bool:
    said = ast.unparse(owner)
    return said in ("sa", "connection") or "sql" in said


def _argument(argument: ast.expr) -> Iterator[str]:
    made = isinstance(argument, ast.Call) and ast.unparse(argument.func) in BUILDERS
    if not made and not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
        yield f"line {argument.lineno}: {ast.unparse(argument)} is no constant"


@pytest.mark.promise(6)
@pytest.mark.known_failure("CVE-2026-42208")
def test_no_statement_is_built_from_text() -> None:
    root = Path(cloudlm.__file__).parent
    found = [
        f"{path.relative_to(root)} {fault}"
        for room in ("state", "control", "gateway", "security", "cli")
        for path in sorted((root / room).rglob("*.py"))
        for fault in faults(path.read_text("utf-8"))
    ]
    assert found == []


@pytest.mark.promise(6)
@pytest.mark.parametrize("mark", ["?", "%s"])
def test_the_statement_that_is_made_holds_columns_and_marks_alone(mark: str) -> None:
    statement = " ".join(_ledger_insert(mark, 4).split())
    marks = rf"\({re.escape(mark)}(, ?{re.escape(mark)})*\)"
    assert re.fullmatch(
        rf"INSERT INTO ledger \([a-z_, ]+\) VALUES {marks}(, ?{marks}){{3}}"
        r" ON CONFLICT \(id\) DO NOTHING",
        statement,
    ), statement


@pytest.mark.parametrize(
    "source",
    [
        "connection.exec_driver_sql(f'DELETE FROM keys WHERE id = {key}')",
        "connection.exec_driver_sql('PRAGMA ' + name)",
        "sa.text(given)",
        "cursor.execute('SELECT ' + name)",
        "cursor.execute(f'SELECT {name}')",
        "x = f'update keys set a = {b}'",
    ],
)
def test_the_check_sees_what_is_forbidden(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    [
        "connection.exec_driver_sql('BEGIN IMMEDIATE')",
        "connection.exec_driver_sql(_ledger_insert(mark, 3), values)",
        "sa.select(a).where(b == c)",
        "print(f'updated {x}')",
    ],
)
def test_the_check_lets_good_code_pass(source: str) -> None:
    assert not list(faults(source))
