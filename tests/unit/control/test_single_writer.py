"""The number of replicas has one writer: control's loop. Two would undo each other's work."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cloudlm

ROOT = Path(cloudlm.__file__).parent
ROOMS = ("control", "gateway", "worker", "drivers", "cli")


def callers(verb: str) -> list[str]:
    """The modules that call a driver's verb with a group's spec."""
    found = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr == verb
                    and "drivers" in ast.unparse(node.func.value)
                ):
                    found.append(path.relative_to(ROOT).as_posix())
    return found


def giving_orders() -> list[str]:
    """The modules that have a plan's orders carried out."""
    paths = (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))
    found = (p for p in paths if "Orders(" in p.read_text("utf-8"))
    return [path.relative_to(ROOT).as_posix() for path in found]


@pytest.mark.promise(25)
@pytest.mark.known_failure("kthena#1019")
def test_control_s_loop_alone_tells_drivers_how_many() -> None:
    assert set(callers("apply")) == {"control/orders.py"}
    assert giving_orders() == ["control/reconcile.py"]
