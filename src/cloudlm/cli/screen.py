"""What a person sees: tables, JSON, progress bars, plain errors.

Results go to standard output, talk to standard error. Bars appear only on a terminal. Every
command that prints data prints it as JSON when asked. Texts come from anywhere (a log, a model, a
server), so none is read as markup and none may steer the terminal. What draws on terminals is
imported where something is drawn: scripts that ask many times need none of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cloudlm.cli.folding import UNBROKEN, folded, width_of, widths_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, TaskID

BytesProgress = Callable[[int, int, str], None]

# They reorder what is shown, so that a text can look like another (Unicode TR 36).
_BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

_GAP = 2
_NEVER_FOLDED = frozenset({"NAME", "ID"})

# With one of them rich takes for a terminal what is none, or the other way round.
_OF_TERMINALS = ("FORCE_COLOR", "TTY_COMPATIBLE")


class Screen:
    """One of the two outputs: a console of rich, which is made when it is first needed."""

    def __init__(self, *, stderr: bool = False) -> None:
        self._stderr = stderr

    @cached_property
    def console(self) -> Console:
        from rich.console import Console

        plain = {"highlight": False, "markup": False, "emoji": False}
        return Console(stderr=self._stderr, soft_wrap=True, **plain)  # type: ignore[arg-type]

    @property
    def is_terminal(self) -> bool:
        """Whether somebody sees it at once."""
        file = sys.stderr if self._stderr else sys.stdout
        plain = not any(name in os.environ for name in _OF_TERMINALS) and not file.isatty()
        if plain and "console" not in self.__dict__:
            return False
        return self.console.is_terminal

    @property
    def width(self) -> int:
        """Characters in a line."""
        return self.console.width

    def print(self, *parts: Any, **options: Any) -> None:
        """As rich's consoles print."""
        self.console.print(*parts, **options)


out = Screen()
talk = Screen(stderr=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output, at once."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_json_line(value: Any) -> None:
    """One JSON document on one line, for results that come one after another."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_text(text: str, end: str = "\n") -> None:
    """Text on standard output as it is, without what would steer the terminal."""
    sys.stdout.write(_harmless(text, keep="\n\t") + end)
    sys.stdout.flush()


def print_folded(text: str) -> None:
    """Lines on standard output; a terminal shows those too long for it folded between words."""
    for line in text.splitlines():
        pieces = [line]
        if out.is_terminal and width_of([line]) > out.width:
            pieces = textwrap.wrap(
                line,
                out.width,
                subsequent_indent="  ",
                break_on_hyphens=False,
                break_long_words=False,
            )
        out.print(_harmless("\n".join(pieces), keep="\n"))


def print_marked(mark: str, style: str, rest: str, end: str = "\n") -> None:
    """A line on standard output that begins with a mark, coloured on a terminal."""
    from rich.text import Text

    out.print(Text.assemble((mark, style), rest), end=end)


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    empty: str,
    whole: Collection[str] = _NEVER_FOLDED,
) -> None:
    """A table on standard output; ``empty`` on standard error if there is nothing to show.

    A terminal folds long cells between words, very long words too where there is no room for
    them, and the columns in ``whole`` never; where shorter words have no room either, each row is
    a block of lines. Elsewhere every row is one line, however long.
    """
    if not rows:
        say(empty)
        return
    cells = [["" if cell is None else _harmless(str(cell)) for cell in row] for row in rows]
    lines = [list(columns), *cells]
    if not out.is_terminal:
        _print_aligned([[cell.replace(UNBROKEN, " ") for cell in row] for row in lines])
        return
    widths = widths_of(lines, whole, out.width, gap=_GAP)
    if widths is None:
        _print_blocks(columns, cells)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None,
        show_edge=False,
        padding=(0, _GAP, 0, 0),
        pad_edge=False,
        header_style="bold",
        width=sum(widths) + _GAP * (len(widths) - 1),
    )
    for column, width in zip(columns, widths, strict=True):
        table.add_column(Text(folded(column, width)), width=width, overflow="fold")
    for row in cells:
        pairs = zip(row, widths, strict=True)
        table.add_row(*[Text(folded(cell, width)) for cell, width in pairs])
    out.print(table, soft_wrap=False, crop=False)


def _print_blocks(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A line per cell that holds something, and an empty line after each row."""
    wide = max(len(column) for column in columns)
    for number, row in enumerate(rows):
        if number:
            out.print("")
        for column, cell in zip(columns, row, strict=True):
            if cell:
                print_folded(f"{column.ljust(wide)}  {cell.replace(UNBROKEN, ' ')}")


def print_across(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table of numbers whose columns are many: as many beside each other as the terminal holds,
    the others below, each time after the first column."""
    wide = out.width if out.is_terminal else sys.maxsize
    first, *others = zip(columns, *rows, strict=True)
    shown: list[tuple[Any, ...]] = [first]
    for column in others:
        if len(shown) > 1 and sum(width_of(one) + _GAP for one in (*shown, column)) - _GAP > wide:
            _print_columns(shown)
            out.print("")
            shown = [first]
        shown.append(column)
    _print_columns(shown)


def _print_columns(columns: Sequence[Sequence[Any]]) -> None:
    head, *rows = zip(*columns, strict=True)
    print_table(head, rows, "", whole=head)


def _print_aligned(rows: list[list[str]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print_text(line.rstrip())


def say(text: str) -> None:
    """Talk: to standard error, so that results can be piped."""
    talk.print(_harmless(text, keep="\n\t"))


def fail(text: str) -> None:
    """A plain error on standard error."""
    from rich.text import Text

    talk.print(Text.assemble(("error:", "bold red"), " ", _harmless(text, keep="\n\t")))


def _harmless(text: str, keep: str = "") -> str:
    """``text`` without control characters, which could move the cursor or hide words."""
    if text.isprintable():
        return text
    return "".join(c if c in keep or not _steers(c) else " " for c in text)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _BIDIRECTIONAL


@contextlib.contextmanager
def bytes_bar(title: str) -> Iterator[BytesProgress]:
    """A bar over bytes done; silent when standard error is not a terminal."""
    from rich.progress import BarColumn, DownloadColumn

    with _bar(title, None, BarColumn(), DownloadColumn()) as (bar, task):

        def update(done_bytes: int, total_bytes: int, what: str) -> None:
            bar.update(
                task,
                completed=done_bytes,
                total=total_bytes or None,
                description=_harmless(f"{title} {what}".rstrip()),
            )

        yield update


@contextlib.contextmanager
def share_bar(title: str) -> Iterator[Callable[[float, str], None]]:
    """A bar from 0 to 1 with a message; silent when standard error is not a terminal."""
    from rich.progress import BarColumn

    with _bar(title, 1.0, BarColumn()) as (bar, task):

        def update(share: float, message: str) -> None:
            bar.update(task, completed=share, description=_titled(title, message))

        yield update


@contextlib.contextmanager
def spinner(title: str) -> Iterator[Callable[[str], None]]:
    """Work of unknown length; silent when standard error is not a terminal."""
    with _bar(title, None) as (bar, task):

        def update(message: str) -> None:
            bar.update(task, description=_titled(title, message))

        yield update


@contextlib.contextmanager
def _bar(
    title: str, total: float | None, *middle: ProgressColumn
) -> Iterator[tuple[Progress, TaskID]]:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    words = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), words, *middle, TimeElapsedColumn())
    hidden = not talk.is_terminal
    with Progress(*columns, console=talk.console, transient=True, disable=hidden) as bar:
        yield bar, bar.add_task(title, total=total)


def _titled(title: str, message: str) -> str:
    return _harmless(f"{title}: {message}" if message else title)


def size_text(size_bytes: float) -> str:
    """Bytes as people read them: 8.3 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def age_text(seconds: float) -> str:
    """How long ago as people read it: 42 s, 5 min, 3 h, 12 d."""
    for unit, length_s, until_s in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < until_s:
            return f"{max(0.0, seconds) // length_s:.0f} {unit}"
    return f"{seconds // 86_400:.0f} d"


def count_text(count: int) -> str:
    """Parameters as people read them: 4.2M."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f}{unit}"
    return str(count)
