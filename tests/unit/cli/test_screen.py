"""What a person sees, on a terminal and elsewhere."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cloudlm.cli import screen
from cloudlm.cli.folding import unbroken
from cloudlm.core.settings import LogSettings
from cloudlm.telemetry.logs import get_logger, setup_logging


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Both streams on a terminal of 40 columns."""
    monkeypatch.setenv("TERM", "xterm")
    text = io.StringIO()
    for name in ("out", "talk"):
        console = Console(
            file=text, force_terminal=True, width=40, highlight=False, markup=False, emoji=False
        )
        monkeypatch.setattr(getattr(screen, name), "console", console)
    return text


@contextlib.contextmanager
def every_bar() -> Iterator[None]:
    with screen.bytes_bar("a[/b]") as update:
        update(1, 2, "[/x]")
        yield
    with screen.share_bar("b") as share:
        share(0.5, "[/x]\x1b[2J")
    with screen.spinner("c") as spin:
        spin("[bold")


def test_bars_are_silent_when_not_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with every_bar():
        pass
    assert capsys.readouterr() == ("", "")


def test_bars_on_a_terminal_show_messages_as_they_are(terminal: io.StringIO) -> None:
    with every_bar():
        pass
    assert "a[/b] [/x]" in terminal.getvalue()
    assert "b: [/x] [2J" in terminal.getvalue()


@pytest.mark.usefixtures("restored_logging")
def test_a_log_line_while_a_bar_is_drawn_stands_above_it(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    setup_logging(LogSettings(format="text"), "serve")
    with screen.share_bar("loading") as update:
        update(0.5, "")
        get_logger("x").warning("careful", extra={"fields": {"what": "[/x]"}})
    (line,) = [line for line in terminal.getvalue().split("\n") if "careful" in line]
    _, mark, said = line.rpartition("\x1b[2K")  # the bar is wiped first
    assert mark
    assert "loading" not in said
    assert said.endswith(" warning careful what=[/x]")


def test_a_table_on_a_terminal_loses_no_letter(terminal: io.StringIO) -> None:
    screen.print_table(("NAME", "MESSAGE"), [("n", "[/red]" + "abcdefghij" * 9)], "nothing")
    lines = terminal.getvalue().splitlines()
    assert len(lines) > 2
    assert "".join(line[4:].strip() for line in lines[1:]) == "[/red]" + "abcdefghij" * 9


WORDS = st.text("ab1.-/", min_size=1, max_size=9)
CELLS = st.lists(WORDS, max_size=6).map(" ".join)


@given(
    rows=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=4),
    columns=st.integers(36, 120),
)
def test_a_cell_is_folded_between_words_while_the_words_have_room(
    rows: list[tuple[str, str, str]], columns: int
) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=columns, color_system=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "out", console)
        screen.print_table(("X", "Y", "Z"), rows, "nothing")
    lines = text.getvalue().splitlines()
    assert all(len(line) <= columns for line in lines)
    given_words = sorted(" ".join(cell for row in rows for cell in row).split())
    assert sorted(" ".join(lines[1:]).split()) == given_words


def test_what_is_unbroken_and_whole_columns_stay_in_one_piece(terminal: io.StringIO) -> None:
    machine = "aws/eu-north-1/g6e.12xlarge"
    row = (machine, f"{unbroken('4 x one')} + {unbroken('12 x two')}")
    screen.print_table(("MACHINE", "CHOICE"), [row], "nothing", whole={"MACHINE"})
    shown = terminal.getvalue()
    assert machine in shown
    assert "4 x one" in shown
    assert "12 x two" in shown
    assert "\u00a0" not in shown


def test_a_row_whose_words_have_no_room_is_a_block_of_lines(terminal: io.StringIO) -> None:
    row = ("k1", "2027-01-15", "2027-02-15", "principal-acme", "", "acme/web")
    screen.print_table(("ID", "MADE", "ENDS", "WHO", "LIMITS", "SCOPE"), [row, row], "nothing")
    block = [
        "ID      k1",
        "MADE    2027-01-15",
        "ENDS    2027-02-15",
        "WHO     principal-acme",
        "SCOPE   acme/web",
    ]
    assert terminal.getvalue().splitlines() == [*block, "", *block]


def test_a_table_in_a_pipe_is_a_line_per_row(capsys: pytest.CaptureFixture[str]) -> None:
    screen.print_table(("NAME", "X"), [("n", None), ("longer", "y\ny" * 99)], "nothing")
    assert capsys.readouterr().out == "NAME    X\nn\nlonger  " + "y y" * 99 + "\n"
    screen.print_table(("NAME",), [], "nothing here")
    assert capsys.readouterr() == ("", "nothing here\n")


def test_json_is_valid_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"text": "é [bold] \x1b \n", "none": None}
    screen.print_json(value)
    screen.print_json_line(value)
    first, second = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert json.loads(first) == json.loads(second) == value


def test_texts_cannot_pretend_to_be_others(capsys: pytest.CaptureFixture[str]) -> None:
    screen.print_text("a\u202eb\x07\r\x9bc\td\nё", end="")
    assert capsys.readouterr().out == "a b   c\td\nё"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (8_100_000, "8.1 MB"), (7e12, "7000.0 GB")],
)
def test_sizes(size: float, text: str) -> None:
    assert screen.size_text(size) == text


@pytest.mark.parametrize(("count", "text"), [(7, "7"), (4_000_000, "4.0M"), (7e9, "7.0B")])
def test_counts(count: int, text: str) -> None:
    assert screen.count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (1e6, "11 d")],
)
def test_ages(seconds: float, text: str) -> None:
    assert screen.age_text(seconds) == text
