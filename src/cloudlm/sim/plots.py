"""Line plots as SVG text: axes with round numbers, one line per policy, colours by class.

Pure: numbers in, text out. Colours are the page's (``page``), so that they follow its light or dark
mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34
MOST_POINTS = 360


@dataclass(frozen=True, slots=True)
class Line:
    """One line: points from left to right. ``style`` names its colour; ``steps`` keeps each value
    until the next."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "0"
    steps: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows: where it begins and ends, its ticks with their texts, and whether it
    grows by factors."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low, 1e-12))
        return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.0


def linear(high: float, low: float = 0.0, *, unit: str = "") -> Axis:
    """An axis from ``low`` to a round number from ``high`` up."""
    span = max(high - low, 1e-9)
    raw = span / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    count = math.ceil(span / step - 1e-9)
    ticks = tuple((low + n * step, _number(low + n * step) + unit) for n in range(count + 1))
    return Axis(low, low + count * step, ticks)


def clock(duration_s: float) -> Axis:
    """Time from 0, in hours, minutes or seconds; it ends where the time does."""
    unit_s, unit = next(
        (one for one in ((3600.0, "h"), (60.0, "min")) if duration_s >= 2 * one[0]), (1.0, "s")
    )
    axis = linear(duration_s / unit_s)
    ticks = tuple((at * unit_s, text) for at, text in axis.ticks if at * unit_s <= duration_s)
    return Axis(0.0, duration_s, (*ticks[:-1], (ticks[-1][0], f"{ticks[-1][1]} {unit}")))


def factors(low: float, high: float) -> Axis:
    """Seconds from a power of ten to a power of ten."""
    first = math.floor(math.log10(max(low, 1e-3)))
    last = max(math.ceil(math.log10(max(high, 1e-3))), first + 1)
    ticks = tuple((10.0**n, _seconds(10.0**n)) for n in range(first, last + 1))
    return Axis(10.0**first, 10.0**last, ticks, logarithmic=True)


def plot(title: str, lines: Sequence[Line], x: Axis, y: Axis, x_label: str = "") -> str:
    """A whole plot as an ``<svg>`` element."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
    ]
    for value, text in y.ticks:
        at = _y(y, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{text}</text>'
        )
    for value, text in x.ticks:
        at = _x(x, value)
        # The last one ends with the axis, or the picture's edge would cut it.
        anchor = "end" if at > WIDTH - 2 * RIGHT else "middle"
        parts.append(_text(at, HEIGHT - BOTTOM + 16, anchor, text))
    if x_label:
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 2, "middle", x_label))
    for line in lines:
        parts.append(
            f'<path class="line s{line.style}" d="{_path(line, x, y)}">'
            f"<title>{escape(line.name)}</title></path>"
        )
    parts.append("</svg>")
    return "".join(parts)


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="tick" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``MOST_POINTS`` of them, each the highest of its neighbours: peaks stay."""
    size = -(-len(points) // MOST_POINTS) or 1
    groups = [points[n : n + size] for n in range(0, len(points), size)]
    return [(group[0][0], max(value for _, value in group)) for group in groups]


def _path(line: Line, x: Axis, y: Axis) -> str:
    commands: list[str] = []
    before = 0.0
    for at, value in line.points:
        px, py = _x(x, at), _y(y, value)
        if not commands:
            commands.append(f"M{px},{py}")
        elif line.steps:
            commands.append(f"H{px}" if py == before else f"H{px}V{py}")
        else:
            commands.append(f"L{px},{py}")
        before = py
    return "".join(commands)


def _x(axis: Axis, value: float) -> float:
    return round(LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT), 1)


def _y(axis: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM), 1)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 1 else f"{value * 1000:.3g} ms"
