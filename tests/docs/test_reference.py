"""Documents cannot lie: the reference is what the program says, and paths that docs name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs.generate import PAGES, stale_pages

ROOT = Path(__file__).parents[2]
PAPERS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").glob("*.md")]
)
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#]+)")
NAMED = re.compile(r"`((?:src|tests|docs|examples|bench|starter)/[\w./-]+)`")
MODULE = re.compile(
    r"`((?:core|engine|registry|state|gateway|control|worker|drivers|cli|client|"
    r"security|telemetry)/[\w/]+(?:\.py)?)`"
)


def test_the_generated_reference_is_up_to_date() -> None:
    assert stale_pages() == [], "run 'make docs'"
    assert {path.name for path in (ROOT / "docs" / "reference").glob("*.md")} == set(PAGES)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_that_a_paper_names_exist(paper: Path) -> None:
    text = paper.read_text("utf-8")
    missing = [link for link in LINK.findall(text) if not (paper.parent / link).exists()]
    missing += [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
    package = ROOT / "src" / "cloudlm"
    for name in MODULE.findall(text):
        here = package / name
        if not (here.exists() or here.with_suffix(".py").exists()):
            missing.append(name)
    assert missing == []


def test_the_map_names_every_room() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    rooms = [path.parent.name for path in (ROOT / "src" / "cloudlm").glob("*/__init__.py")]
    assert [room for room in rooms if f"{room}/" not in text] == []
    assert len(text.splitlines()) <= 200
