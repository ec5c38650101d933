"""One policy against another as a page: self-contained, no script, nothing from elsewhere.

Numbers first, then the fleet over time and how long answers took to begin. Follows the reader's
light or dark mode. Every text of a scenario is escaped. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

from cloudlm.sim.measure import Moment
from cloudlm.sim.plots import MOST_POINTS, Line, clock, factors, linear, plot, thinned
from cloudlm.sim.report import COLUMNS, table_row
from cloudlm.sim.report_rollouts import rollout_plots, rollout_table
from cloudlm.sim.simulation import Result

STYLES = 6
"""Colours; later policies repeat them dashed."""

_STYLE = """
:root{color-scheme:light dark;--page:#fbfbf9;--card:#fff;--text:#1a1a19;--dim:#65645f;
--grid:#e4e3df;--c0:#2a78d6;--c1:#d9590b;--c2:#0f8a5f;--c3:#b03a9a;--c4:#8a6d00;--c5:#5346c2}
@media (prefers-color-scheme:dark){:root{--page:#161615;--card:#1f1f1d;--text:#eeeeea;--dim:#a3a29b;
--grid:#383834;--c0:#5b9df0;--c1:#f0853f;--c2:#3dbb8b;--c3:#d972c5;--c4:#c9a52c;--c5:#988df0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:28px 20px 48px;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:22px;margin:0 0 4px}h2{font-size:15px;margin:0 0 2px}
p{margin:0 0 12px;color:var(--dim);max-width:75ch}
.scroll{overflow-x:auto;margin:16px 0 24px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 7px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
th{color:var(--dim);font-size:12px;font-weight:600;white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;font-weight:600}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:16px}
.card{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:14px 16px 8px}
.card p{font-size:13px;margin-bottom:6px}
svg{display:block;width:100%;height:auto}
.grid{stroke:var(--grid);stroke-width:1}
.tick{fill:var(--dim);font:12px system-ui,sans-serif}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.key{display:inline-block;width:18px;height:0;border-top:3px solid;margin-right:8px;
vertical-align:middle}
.sx{stroke:var(--dim)}
"""


def page(name: str, notes: Sequence[str], results: Sequence[Result]) -> str:
    """The page as text."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width,initial-scale=1">',
        f"<title>{escape(name)}: simulation</title><style>{_STYLE}{_colours(len(results))}</style>",
        f"<h1>{escape(name)}</h1>",
        f"<p>{' · '.join(escape(note) for note in notes)}</p>",
        _table(results),
        rollout_table(results),
        '<div class="cards">',
        *_cards(results),
        "</div></html>\n",
    ]
    return "".join(parts)


def _colours(count: int) -> str:
    rules = []
    for number in range(count):
        colour, dashes = number % STYLES, 3 * (number // STYLES)
        dash = f";stroke-dasharray:{2 * dashes} {dashes}" if dashes else ""
        border = ";border-top-style:dashed" if dashes else ""
        rules.append(f".s{number}{{stroke:var(--c{colour}){dash}}}")
        rules.append(f".k{number}{{border-top-color:var(--c{colour}){border}}}")
    return "".join(rules)


def _table(results: Sequence[Result]) -> str:
    head = "".join(f"<th>{escape(_heading(column))}</th>" for column in COLUMNS)
    rows = []
    for number, result in enumerate(results):
        first, *rest = table_row(result)
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        key = f'<span class="key k{number}"></span>'
        rows.append(f"<tr><td>{key}{escape(first)}</td>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _heading(column: str) -> str:
    """A column's name as a page has it: capitals where they stand for words."""
    words = column.capitalize()
    for short in ("TTFT", "TPOT", "Mtok"):
        words = re.sub(short, short, words, flags=re.IGNORECASE)
    return words


def _cards(results: Sequence[Result]) -> list[str]:
    return [
        _card(
            "Requests arriving",
            "A second, the same for every policy.",
            _over_time(results[:1], _arrivals, steps=False, name="arrivals"),
        ),
        _card(
            "Replicas that answer",
            "Ready to take requests; starting ones cost money too and are not shown.",
            _over_time(results, lambda ms: [(m.at, float(m.ready)) for m in ms], steps=True),
        ),
        _card(
            "Requests waiting",
            "In the gateway's queue or a replica's; peaks are kept.",
            _over_time(results, lambda ms: [(m.at, float(m.queued)) for m in ms], steps=False),
        ),
        _card(
            "Time to the first token",
            "Share of requests whose answer had begun after so long; further left is better.",
            _distribution(results),
        ),
        *(_card(*one) for one in rollout_plots(results)),
    ]


def _card(title: str, text: str, picture: str) -> str:
    return f'<section class="card"><h2>{title}</h2><p>{text}</p>{picture}</section>'


def _arrivals(moments: Sequence[Moment]) -> list[tuple[float, float]]:
    pairs = pairwise(moments)
    return [(b.at, b.arrived / (b.at - a.at)) for a, b in pairs if b.at > a.at]


def _over_time(
    results: Sequence[Result],
    points: Callable[[Sequence[Moment]], list[tuple[float, float]]],
    *,
    steps: bool,
    name: str = "",
) -> str:
    lines = [
        Line(name or one.policy, thinned(points(one.moments)), "x" if name else str(number), steps)
        for number, one in enumerate(results)
    ]
    values = [value for line in lines for _, value in line.points]
    last = max((at for line in lines for at, _ in line.points), default=1.0)
    return plot("over time", lines, clock(max(last, 1.0)), linear(max(values, default=0.0) or 1.0))


def _distribution(results: Sequence[Result]) -> str:
    lines = []
    for number, result in enumerate(results):
        ordered = sorted(result.ttft_s)
        count = len(ordered)
        step = max(1, count // MOST_POINTS)
        ranks = sorted({*range(0, count, step), count - 1} - {-1})
        points = [(ordered[rank], (rank + 1) / count * 100) for rank in ranks]
        lines.append(Line(result.policy, points, str(number)))
    values = [value for line in lines for value, _ in line.points if value > 0]
    x = factors(min(values, default=0.1), max(values, default=1.0))
    return plot("time to the first token", lines, x, linear(100.0, unit=" %"))
