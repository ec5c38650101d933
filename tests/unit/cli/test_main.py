"""Exit codes, plain errors and help of the command as it is started."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command

from cloudlm.cli import main as command
from cloudlm.cli.main import app, main
from cloudlm.cli.nouns import NOUNS, Noun, _sparing
from cloudlm.core.errors import Conflict


def _commands() -> list[list[str]]:
    root: Any = get_command(app)
    found: list[list[str]] = [[]]
    for name, one in root.commands.items():
        found.append([name])
        found += [[name, inner] for inner in getattr(one, "commands", {})]
    return found


COMMANDS = _commands()
LEAVES = [
    words
    for words in COMMANDS
    if words and not any(other[:-1] == words for other in COMMANDS if len(other) == 2)
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_of_every_command(words: list[str], ok: Callable[..., Any]) -> None:
    text = ok(*words, "--help").stdout
    assert text.splitlines()[0].startswith("Usage: ")
    assert ok(*words, "-h").stdout == text
    assert "..." not in text.partition("Commands:")[2]  # no summary is cut off


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_command_has_json(words: list[str], ok: Callable[..., Any]) -> None:
    assert "--json" in ok(*words, "--help").stdout


def test_misuse(cli: Callable[..., Any]) -> None:
    for words in (["nonsense"], ["deploy"], ["status", "--nonsense"], ["up", "--port", "x"]):
        result = cli(*words)
        assert result.exit_code == 2
        assert result.stdout == ""


def run_main(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> int:
    """Run ``main`` over an application whose only command raises ``error``."""
    broken = typer.Typer()

    @broken.command()
    def fail() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(command, "app", broken)
    monkeypatch.setattr(sys, "argv", ["cloudlm"])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_an_error_is_one_plain_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, Conflict("[/x] is :warning: taken\x1b[2J")) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "error: [/x] is :warning: taken [2J\n")


def test_a_fault_of_ours_has_no_traceback_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CLOUDLM_DEBUG", raising=False)
    assert run_main(monkeypatch, ZeroDivisionError("why")) == 1
    shown = capsys.readouterr().err
    assert "ZeroDivisionError: why" in shown
    assert "CLOUDLM_DEBUG" in shown
    assert "Traceback" not in shown
    monkeypatch.setenv("CLOUDLM_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run_main(monkeypatch, ZeroDivisionError("why"))


def test_a_full_disk_is_no_fault_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/home/logs/gateway.log")
    assert run_main(monkeypatch, error) == 1
    shown = capsys.readouterr().err
    assert "/home/logs/gateway.log: the disk is full" in shown
    assert "fault of cloudlm" not in shown


def test_done_and_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(monkeypatch, None) == 0
    assert run_main(monkeypatch, KeyboardInterrupt()) == 130


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    """As in ``cloudlm config | head -0``: neither a traceback nor a failure."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "cloudlm.cli.main", "config", "--json"],
        env={**os.environ, "CLOUDLM_HOME": str(tmp_path)},
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


def _imported(tmp_path: Path, *words: str) -> set[str]:
    """The modules that a process has read when ``cloudlm WORDS`` ends."""
    code = (
        "import sys\nfrom cloudlm.cli.main import main\n"
        f"sys.argv = ['cloudlm', *{list(words)}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('MODULES', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "CLOUDLM_HOME": str(tmp_path),
            "CLOUDLM_API_KEY": "clm_live_x",
            "CLOUDLM_CONTROL_URL": "http://127.0.0.1:9",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return set(done.stdout.partition("MODULES ")[2].split())


_HEAVY = {
    *("torch", "numpy", "sqlalchemy", "alembic", "tokenizers", "jinja2", "obstore", "cryptography"),
    *("cedarpy", "fastapi", "starlette", "uvicorn", "uvloop", "aiohttp", "openai", "authlib"),
    *("cloudlm.control", "cloudlm.gateway", "cloudlm.worker", "cloudlm.engine", "cloudlm.sim"),
}
# What a command needs that talks to the control API, and the help of all commands does not.
_OF_CLIENTS = {"httpx2", "httpcore2", "ssl", "yaml", "rich", "cloudlm.client", "cloudlm.state"}
_UNASKED = {
    *("cloudlm.cli.simulate", "cloudlm.cli.models", "cloudlm.cli.up"),
    *("pydantic", "rich.progress", "rich.table"),  # for values given, and for terminals
}


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (("--help",), _HEAVY | _OF_CLIENTS | {"cloudlm.core.deployment"}),
        (("--version",), _HEAVY | _OF_CLIENTS | {"cloudlm.core.deployment"}),
        (("keys", "--help"), _HEAVY),
        (("status",), _HEAVY | _UNASKED),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else "",
)
def test_what_a_command_does_not_import(
    tmp_path: Path, words: tuple[str, ...], unwanted: set[str]
) -> None:
    imported = _imported(tmp_path, *words)
    assert "cloudlm.cli.main" in imported
    assert imported & unwanted == set()


@pytest.mark.parametrize("noun", NOUNS, ids=lambda noun: noun.name)
def test_a_summary_is_that_of_its_command(noun: Noun) -> None:
    root: Any = get_command(app)
    assert noun.summary == root.commands[noun.name].get_short_help_str(limit=200)


def test_a_name_that_is_nearly_right(cli: Callable[..., Any]) -> None:
    result = cli("statsu")
    assert result.exit_code == 2
    assert "Did you mean 'status'" in result.output


def test_what_is_missing_or_wrong_is_told_though_little_is_read(cli: Callable[..., Any]) -> None:
    missing = cli("scale")
    assert (missing.exit_code, "Missing argument" in missing.stderr) == (2, True)
    wrong = cli("keys", "create", "x", "--requests-per-minute", "many")
    assert (wrong.exit_code, "--requests-per-minute" in wrong.stderr) == (2, True)


def _look(value: str | None) -> str:
    return f"looked at {value}"


def test_an_option_that_was_not_given_is_none_or_an_empty_list() -> None:
    """As typer reads it, and without reading it; who looks at a value sees also that it is none."""
    found: list[Any] = []

    def given(
        text: Annotated[str | None, typer.Option()] = None,
        many: Annotated[list[str] | None, typer.Option()] = None,
        watched: Annotated[str | None, typer.Option(callback=_look)] = None,
        number: Annotated[int, typer.Option()] = 3,
        rest: Annotated[list[str] | None, typer.Argument()] = None,
    ) -> None:
        found.append((text, many, watched, number, rest))

    def values(*words: str) -> Any:
        for spared in (False, True):
            app = typer.Typer()
            app.command()(given)
            made: Any = get_command(app)
            if spared:
                made.get_params = _sparing(made.get_params)
            made(list(words), standalone_mode=False)
        usual, sparing = found[-2:]
        assert sparing == usual
        return sparing

    text, _, watched, number, _ = values()
    assert (text, watched, number) == (None, "looked at None", 3)
    every = ("--text", "a", "--many", "b", "--many", "c", "--number", "4", "d")
    assert values(*every) == ("a", ["b", "c"], "looked at None", 4, ["d"])
