"""Where the cells of a table are folded so that it fits a terminal: between words before within
them, the widest columns first. Pure; must not print.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

LONG_WORD = 16
"""Characters: no word as short as this is ever folded."""

UNBROKEN = "\u00a0"
"""A space at which no cell is folded; shown as a common one."""


def unbroken(text: str) -> str:
    """``text`` as a piece of a cell that is folded before and after, but not within."""
    return text.replace(" ", UNBROKEN)


def width_of(cells: Sequence[str]) -> int:
    """The columns that the widest takes on a terminal."""
    from rich.cells import cell_len

    return max(cell_len(cell) for cell in cells)


def widths_of(
    rows: Sequence[Sequence[str]], whole: Collection[str], most: int, *, gap: int
) -> list[int] | None:
    """How wide each column is so that all are within ``most`` with ``gap`` between them: short
    columns as they are, long ones folded between words, and within those above ``LONG_WORD``
    where they must be. None if that is not room enough. The first row names the columns; those in
    ``whole`` are as wide as their longest cell."""
    head = rows[0]
    wished = [width_of(column) for column in zip(*rows, strict=True)]
    words = [_longest_word(column) for column in zip(*rows, strict=True)]
    least = [
        wide if name in whole else word
        for name, wide, word in zip(head, wished, words, strict=True)
    ]
    room = most - gap * (len(head) - 1)
    if sum(least) <= room:
        return _levelled(least, wished, room)
    kept = [
        wide if name in whole else min(wide, LONG_WORD)
        for name, wide in zip(head, least, strict=True)
    ]
    return _levelled(kept, least, room) if sum(kept) <= room else None


def _levelled(least: list[int], wished: list[int], room: int) -> list[int]:
    """Widths between ``least`` and ``wished``, none of them held below another one's share: the
    widest give way first."""
    best = least
    for level in range(1, max(wished) + 1):
        pairs = zip(least, wished, strict=True)
        found = [max(low, min(high, level)) for low, high in pairs]
        if sum(found) > room:
            break
        best = found
    return best


def _longest_word(cells: Sequence[str]) -> int:
    return max(1, width_of([word for cell in cells for word in cell.split(" ")]))


def folded(cell: str, width: int) -> str:
    """``cell`` in lines of at most ``width`` where its words allow that."""
    lines = textwrap.wrap(cell, width, break_on_hyphens=False)
    return "\n".join(lines).replace(UNBROKEN, " ")
