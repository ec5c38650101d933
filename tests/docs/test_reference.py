"""Documents cannot lie: the reference is what the program says, and paths that docs name exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from docs.generate import PAGES, stale_pages
from docs.translations import anchor
from typer.main import get_command

from cloudlm.cli.demo import _print_start, questions
from cloudlm.cli.main import app
from cloudlm.cli.up import Running
from cloudlm.core.settings import read_settings
from cloudlm.registry.bundled import BUNDLED

ROOT = Path(__file__).parents[2]
PAPERS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").glob("*.md")]
)
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#]+)")
NAMED = re.compile(r"`((?:src|tests|docs|examples|bench|starter)/[\w./-]+)`")
PACKAGE = ROOT / "src" / "cloudlm"
ROOMS = "|".join(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
MODULE = re.compile(rf"`((?:{ROOMS})/[\w/]+(?:\.py)?)`")
ANCHOR = re.compile(r"\]\((?!https?://)([^)#\s]*)#([^)\s]+)\)")
BLOCK = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
METRIC = re.compile(r"\bcloudlm_[a-z_]+[a-z]\b")
VARIABLE = re.compile(r"\bCLOUDLM_[A-Z_]+[A-Z]\b")
NAME = re.compile(r"[\"`](cloudlm_[a-z_]+|CLOUDLM_[A-Z_]+)")
SETTINGS = {row.name: row.environment for row in read_settings()[1]}
DEFAULTS = {row.name: row.value for row in read_settings()[1]}
SECTIONS = "|".join({name.partition(".")[0] for name in SETTINGS} - {"home"})
DEFAULT = re.compile(rf"`((?:{SECTIONS})\.[a-z_]+)` \((\d[\d.]*)")
SETTING = re.compile(rf"`((?:{SECTIONS})\.(?!db`)[a-z_]+)`")


def test_the_generated_reference_is_up_to_date() -> None:
    assert stale_pages() == [], "run 'make docs'"
    assert {path.name for path in (ROOT / "docs" / "reference").glob("*.md")} == set(PAGES)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_that_a_paper_names_exist(paper: Path) -> None:
    text = paper.read_text("utf-8")
    missing = [link for link in LINK.findall(text) if not (paper.parent / link).exists()]
    missing += [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
    for name in MODULE.findall(text):
        here = PACKAGE / name
        if not (here.exists() or here.with_suffix(".py").exists()):
            missing.append(name)
    assert missing == []


def _anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    return {anchor(one) for one in HEADING.findall(BLOCK.sub("", text))}


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_headings_that_a_paper_links_to_exist(paper: Path) -> None:
    text = paper.read_text("utf-8")
    missing = []
    for link, place in ANCHOR.findall(text):
        there = (paper.parent / link).read_text("utf-8") if link else text
        if place not in _anchors(there):
            missing.append(f"{link}#{place}")
    assert missing == []


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_defaults_that_a_paper_states_are_the_defaults(paper: Path) -> None:
    """As in "`gateway.max_resumes` (3)", with or without a unit behind the number."""
    stated = DEFAULT.findall(paper.read_text("utf-8"))
    assert [one for one in stated if float(one[1]) != DEFAULTS[one[0]]] == []


@cache
def _named_by_the_program() -> frozenset[str]:
    """Variables and metrics that source and tests name. One that ends in ``_`` is a beginning; of
    settings' variables there is none, for all are known in full."""
    files = [path for room in ("src", "tests") for path in (ROOT / room).rglob("*.py")]
    found = {name for path in files for name in NAME.findall(path.read_text("utf-8"))}
    whole = " ".join(SETTINGS.values())
    return frozenset(name for name in found if not (name.endswith("_") and name in whole))


def _is_in_the_program(name: str) -> bool:
    known = _named_by_the_program()
    beginnings = tuple(one for one in known if one.endswith("_"))
    return name in known or name.removesuffix("_total") in known or name.startswith(beginnings)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_variables_and_metrics_that_a_paper_names_exist(paper: Path) -> None:
    text = paper.read_text("utf-8")
    missing = [name for name in SETTING.findall(text) if name not in SETTINGS]
    named = {*VARIABLE.findall(text), *METRIC.findall(text)} - set(SETTINGS.values())
    missing += sorted(name for name in named if not _is_in_the_program(name))
    assert missing == []


def test_the_transcript_of_the_demo_is_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    shown = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0]
    ready_s = float(re.findall(r"up after (\d+\.\d) s", shown)[0])
    _print_start(Running("", "", None, BUNDLED, None), ready_s)
    assert shown.startswith(capsys.readouterr().out + "\n")
    asked = questions()
    answered = r"^Q (.+)\nA (.+)\n  first token \d+ ms, all \d\.\d\d s$"
    told = re.findall(answered, shown, re.MULTILINE)
    assert [question for question, _ in told] == [item["question"] for item in asked[:2]]
    assert all(answer in item["replies"] for (_, answer), item in zip(told, asked, strict=False))
    assert shown.endswith(f"\n{len(asked)} of {len(asked)} answers are the right reply.\n")


def test_the_map_names_every_room() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    rooms = [path.parent.name for path in (ROOT / "src" / "cloudlm").glob("*/__init__.py")]
    assert [room for room in rooms if f"{room}/" not in text] == []
    assert len(text.splitlines()) <= 200


def test_what_is_not_there_is_found() -> None:
    assert _anchors("# One `way`, or two\n```\n# not one\n```\n") == {"one-way-or-two"}
    assert SETTING.findall("`gateway.nonsense`, `state.db`") == ["gateway.nonsense"]
    assert _is_in_the_program("CLOUDLM_HOME")
    assert _is_in_the_program("CLOUDLM_SECRET_ANYTHING")
    assert not _is_in_the_program("CLOUDLM_GATEWAY" + "_NONSENSE")
    assert not _is_in_the_program("cloudlm" + "_gateway_nonsense_total")


INLINE = re.compile(r"`cloudlm ([^`\n]+)`")
FENCED = re.compile(r"^ *```(?:bash|console|sh)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}(?:\$ )?cloudlm ([^\n]+)", re.MULTILINE)
TYPED = re.compile(r"^ *(?:\$ )?cloudlm ([^\n]+)", re.MULTILINE)
OPTION = re.compile(r"(?<=\s)(--[a-z][a-z-]*|-[a-z])(?=[\s=`]|$)")
GUIDES = [paper for paper in PAPERS if paper.parent.name not in ("reference", "bench")]


def _commands_in(text: str) -> list[str]:
    """What follows ``cloudlm`` in code, up to a pipe, a comment or the next command; each of
    several that are named together, as in ``roles|keys``."""
    found = INLINE.findall(text) + INDENTED.findall(text)
    for block in FENCED.findall(text):
        found += TYPED.findall(block)
    named = []
    for one in found:
        line = re.split(r" +(?:\||>|&|;|#)", one)[0]
        first, _, rest = line.partition(" ")
        named += [f"{name} {rest}".strip() for name in first.split("|")]
    return named


@pytest.mark.parametrize("paper", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_a_paper_names_exist_with_their_options(paper: Path) -> None:
    root: Any = get_command(app)
    wrong = []
    for line in _commands_in(paper.read_text("utf-8")):
        here, words = root, line.split()
        while getattr(here, "commands", None) is not None and words and words[0] in here.commands:
            here = here.commands[words.pop(0)]
        if here is root and not words[0].startswith("-"):
            wrong.append(line)
        elif getattr(here, "commands", None) is None:
            known = {opt for one in here.params for opt in (*one.opts, *one.secondary_opts)}
            known |= {"--help", "-h"}
            wrong += [f"{line}: {opt}" for opt in OPTION.findall(line) if opt not in known]
    assert wrong == []


def test_a_command_that_is_not_there_is_found() -> None:
    text = (
        "`cloudlm keys create --name x | head`, `cloudlm roles|keys` and\ncloudlm is\n"
        "```bash\ncloudlm nonsense --x  # as typed\n```\n"
    )
    assert _commands_in(text) == ["keys create --name x", "roles", "keys", "nonsense --x"]
