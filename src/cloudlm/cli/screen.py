"""What a person sees: tables, JSON, progress bars, plain errors.

Results go to standard output, talk to standard error. Bars appear only on a terminal. Every
command that prints data prints it as JSON when asked.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

BytesProgress = Callable[[int, int, str], None]

out = Console(highlight=False, soft_wrap=True)
talk = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], empty: str) -> None:
    """A table on standard output; ``empty`` on standard error if there is nothing to show."""
    if not rows:
        talk.print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column in ("NAME", "ID"))
    for row in rows:
        table.add_row(*["" if cell is None else str(cell) for cell in row])
    out.print(table)


def say(text: str) -> None:
    """Talk: to standard error, so that results can be piped."""
    talk.print(text, markup=False, soft_wrap=True)


def fail(text: str) -> None:
    """A plain error on standard error."""
    talk.print(f"[bold red]error:[/] {_escape(text)}", soft_wrap=True)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


@contextlib.contextmanager
def bytes_bar(title: str) -> Iterator[BytesProgress]:
    """A bar over bytes done; silent when standard error is not a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=talk, transient=True, disable=not talk.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def update(done_bytes: int, total_bytes: int, what: str) -> None:
            bar.update(
                task,
                completed=done_bytes,
                total=total_bytes or None,
                description=f"{title} {what}".rstrip(),
            )

        yield update


@contextlib.contextmanager
def share_bar(title: str) -> Iterator[Callable[[float, str], None]]:
    """A bar from 0 to 1 with a message; silent when standard error is not a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=talk, transient=True, disable=not talk.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)

        def update(share: float, message: str) -> None:
            text = f"{title}: {message}" if message else title
            bar.update(task, completed=share, description=text)

        yield update


@contextlib.contextmanager
def spinner(title: str) -> Iterator[Callable[[str], None]]:
    """Work of unknown length; silent when standard error is not a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=talk, transient=True, disable=not talk.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def update(message: str) -> None:
            bar.update(task, description=f"{title}: {message}" if message else title)

        yield update


def size_text(size_bytes: float) -> str:
    """Bytes as people read them: 8.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000 or unit == "GB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    raise AssertionError("unreachable")


def count_text(count: int) -> str:
    """Parameters as people read them: 4.2M."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f}{unit}"
    return str(count)
