"""RESULTS.md: each benchmark writes between markers of its own and leaves the rest alone."""

from __future__ import annotations

import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"


def record(name: str, section: str) -> None:
    """Replace what stands between the markers of ``name``, at the end of the file if it has none
    yet. Ends the program if one of the two is missing."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = RESULTS.read_text("utf-8")
    head, found, rest = whole.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found and end not in whole:
        head, tail = f"{whole.rstrip()}\n\n", "\n"
    elif not closed:
        sys.exit(f"{RESULTS.name} has lost one of its markers {begin} and {end}")
    RESULTS.write_text(f"{head}{begin}\n{section.strip()}\n{end}{tail}", "utf-8")
