"""What a line of a replica's log looks like to a person, and to a program."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.cli.log_lines import event_of, readable
from cloudlm.telemetry.logs import _JsonFormatter

LINE = json.dumps(
    {
        "time": "2026-01-31T12:03:01.250Z",
        "level": "info",
        "process": "worker",
        "logger": "cloudlm.worker",
        "event": "model_loaded",
        "model": "models:/bank/1",
        "seconds": 1.25,
        "why": "two words",
    }
)


@pytest.fixture(autouse=True)
def _in_utc(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TZ", "UTC")
    __import__("time").tzset()
    yield
    monkeypatch.undo()
    __import__("time").tzset()


def test_an_event_is_read_from_left_to_right() -> None:
    fields = 'model=models:/bank/1 seconds=1.25 why="two words"'
    assert readable(LINE) == f"2026-01-31 12:03:01 info    model_loaded {fields}"


def test_a_traceback_stands_below() -> None:
    line = json.dumps({**json.loads(LINE), "error": "Traceback\n  File x\nValueError: y"})
    first, *below = readable(line).splitlines()
    assert first.endswith('why="two words"')
    assert below == ["    error:", "    Traceback", "      File x", "    ValueError: y"]


@pytest.mark.parametrize(
    "line",
    [
        "INFO 01-31 12:03:01 [vllm] ready",
        "{not json",
        '{"level": "info"}',
        '{"time": 1, "level": "info", "event": "x"}',
        "[1]",
        "",
        "{" * 5000,
    ],
)
def test_lines_of_others_stay_as_they_are(line: str) -> None:
    assert event_of(line) is None
    assert readable(line) == line


@given(
    st.text(min_size=1),
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name not in ("time", "level", "event")),
        st.none() | st.integers() | st.text() | st.just("x\n2026-01-31 12:03:01 error   forged"),
    ),
)
def test_every_event_of_ours_is_known(event: str, fields: dict[str, Any]) -> None:
    record = logging.LogRecord("cloudlm.x", logging.WARNING, __file__, 1, event, (), None)
    record.fields = fields
    line = _JsonFormatter("worker").format(record)
    assert event_of(line) == json.loads(line)
    shown = readable(line)
    assert " warning " in shown
    told = [name.replace("\n", " ") for name in fields if name not in ("process", "logger")]
    assert all(name in shown for name in told)
    assert all(line.startswith("    ") for line in shown.split("\n")[1:])


def test_logs_for_people_and_for_programs(control: Any, ok: Callable[..., Any]) -> None:
    text = f"{LINE}\nplain \x1b[2J\n"
    control.answers = {"GET /deployments/helper/logs": httpx2.Response(200, text=text)}
    shown = ok("logs", "helper").stdout.splitlines()
    assert "info    model_loaded" in shown[0]
    assert shown[1] == "plain  [2J"
    lines = ok("logs", "helper", "--json").stdout.splitlines()
    assert json.loads(lines[0]) == json.loads(LINE)
    assert json.loads(lines[1]) == {"line": "plain \x1b[2J"}
