"""Figures: the fit finds what made the measurements, and what ships is what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.core.errors import InvalidRequest
from cloudlm.sim.figures import bundled, figures_body, fitted, read_figures
from cloudlm.sim.fit import Measurement, StepTime, fit, predicted_s, read_measurements, worst_error
from cloudlm.sim.replica import SimReplica, Work
from cloudlm.sim.timeline import Timeline

RUNS = [(1, 128, 0, 1), (1, 128, 0, 128), (16, 256, 0, 128), (1, 2048, 0, 1), (4, 3000, 0, 300)]
MORE = [(1, 16, 0, 1), (8, 16, 0, 40)]
SOME = st.floats(1e-6, 1e-2)


def measured(
    step: StepTime, batch: int = 1024, more: Sequence[tuple[int, int, int, int]] = ()
) -> list[Measurement]:
    rows = [Measurement(*run, 1.0) for run in (*RUNS, *more)]
    return [row._replace(seconds=predicted_s(step, row, batch)) for row in rows]


@settings(deadline=None)
@given(SOME, SOME, SOME, SOME.map(lambda x: x / 100))
def test_the_fit_finds_what_made_the_measurements(a: float, b: float, c: float, d: float) -> None:
    step = StepTime(a, b, c, d)
    rows = measured(step)
    assert worst_error(fit(rows, 1024), rows, 1024) < 1e-3


@settings(deadline=None)
@given(SOME, SOME, SOME, SOME.map(lambda x: x / 100), st.floats(1e-3, 1e-1))
def test_many_measurements_tell_what_a_request_takes_on_its_way(
    a: float, b: float, c: float, d: float, way_s: float
) -> None:
    step = StepTime(a, b, c, d, way_s)
    rows = measured(step, more=MORE)
    assert worst_error(fit(rows, 1024), rows, 1024) < 1e-3


def test_few_measurements_do_not_tell_what_a_request_takes_on_its_way() -> None:
    """As many runs as unknowns would explain anything."""
    step = StepTime(0.02, 0.001, 0.002, 0.00001, 0.005)
    assert fit(measured(step, more=MORE), 1024).request_s == pytest.approx(0.005, rel=1e-3)
    assert fit(measured(step), 1024).request_s == 0.0


def test_no_part_is_below_nothing() -> None:
    """More sequences that took less time do not make a sequence cost less than nothing."""
    rows = measured(StepTime(0.02, 0.001, 0.0, 0.0))
    rows[2] = rows[2]._replace(seconds=rows[2].seconds * 0.8)
    assert min(fit(rows, 1024)) >= 0.0


def test_the_bundled_figures_are_what_the_fit_finds() -> None:
    assert bundled()
    for one in bundled().values():
        assert fit(one.rows, one.batch_tokens) == one.step
        assert worst_error(one.step, one.rows, one.batch_tokens) < 0.15
        assert one.measured and one.source


@pytest.mark.parametrize("name", sorted(bundled()))
def test_the_model_takes_as_long_as_was_measured(name: str) -> None:
    """The simulated replica, not only the formula, repeats the measured runs."""
    one = bundled()[name]
    for row in one.rows:
        if row.cached_tokens:
            continue
        timeline = Timeline()

        class Silent:
            def first_token(self, work: Work) -> None: ...

            def finished(self, work: Work) -> None: ...

        serving = SimReplica(timeline, one, Silent())
        serving._cache.capacity = 1 << 30  # the benchmark's was larger than the default
        for _ in range(row.requests):
            serving.submit(Work(row.prompt_tokens, row.output_tokens))
        timeline.run()
        assert timeline.now == pytest.approx(row.seconds, rel=0.2)


def test_too_few_measurements_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="do not tell"):
        fit([Measurement(1, 100, 0, 1, 1.0)], 1024)


def test_figures_are_written_and_read_back(tmp_path: Path) -> None:
    one = fitted("mine", tuple(measured(StepTime(0.01, 0.001, 0.002, 0.0))), measured="2026-01-01")
    one = replace(one, step=one.step._replace(request_s=0.004))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"figures": [figures_body(one)]}))
    assert read_figures(path) == {"mine": one}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("figures: [{name: a}]", "base_s"),
        ("figures: [{name: a, base_s: 0, prefill_token_s: 1}]", "must take time"),
        ("figures: [{name: a, base_s: 1, prefill_token_s: 1, rows: [[1]]}]", "a row must be"),
        ("figures: [{name: a, base_s: 1, prefill_token_s: 1, colour: 1}]", "no field 'colour'"),
        ("figures: {", "no YAML"),
        ("figures: 2024-02-30", "no YAML"),
    ],
)
def test_broken_figures_are_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=says):
        read_figures(path)


@pytest.mark.parametrize(
    ("line", "says"), [("1,2,3,4,5", "cached_tokens"), ("1,9,0,x,1", "line 2"), ("1,9", "line 2")]
)
def test_broken_measurements_are_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "measured.csv"
    path.write_text("requests,prompt_tokens,cached_tokens,output_tokens,seconds\n" + line + "\n")
    with pytest.raises(InvalidRequest, match=says):
        read_measurements(path)
